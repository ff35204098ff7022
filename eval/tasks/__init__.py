"""One file per task, or per few tasks of one kind. eval.suite imports every file; each registers its tasks."""
