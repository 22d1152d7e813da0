"""A program of its own, run by the fixture `start` in a process that has imported everything already."""

import os
import runpy
import sys

if __name__ == "__main__":
    given = globals()["given"]
    for stream, path in ((1, given["stdout"]), (2, given["stderr"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.environ.update(given["environment"])
    os.chdir(given["folder"])
    sys.path[:0] = given["paths"]
    sys.argv = list(given["words"])
    if sys.argv[0] == "stepwell":
        runpy.run_module("stepwell", run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
