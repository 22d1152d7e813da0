"""From a command's words to the process it works on. Each kind of model has a file, which says how one is named, which
arguments it uses and how it is built; the files are found, not listed."""
