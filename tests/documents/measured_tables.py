"""Writes the pages whose figures are computed from result files.

python -m tests.documents.measured_tables
"""

from tests.documents.scaling_page import PAGE, render

if __name__ == "__main__":
    PAGE.write_text(render())
