"""How answers are judged. No task and no model in here."""
