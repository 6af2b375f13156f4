"""``python -m benchmarks.sparse``: run the study, write its result file, table and plot."""

import sys

from benchmarks.sparse.study import main

if __name__ == "__main__":
    sys.exit(main())
