"""One file per task, or per few tasks of one kind; every file is imported by eval.suite and registers itself."""
