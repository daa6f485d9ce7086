"""Run a notebook from a clean kernel and print it, with its outputs, as JSON: execute_notebook.py FILE."""

import sys

import nbformat
from nbclient import NotebookClient

LONGEST_CELL = 300  # seconds

notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=LONGEST_CELL, kernel_name="python3", coalesce_streams=True).execute()
for cell in notebook.cells:
    cell.metadata.pop("execution", None)  # times of day, which differ from run to run
notebook.metadata.language_info = {"name": "python"}  # not the version that happened to run it
print(nbformat.writes(notebook))
