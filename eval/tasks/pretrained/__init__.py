"""Published weights of other projects: what is loaded from them equals their own implementations."""
