"""The command line under a DeepSpeed that leaves a CPU's communication to gloo.

Its own is an extension that it would compile first, for a minute and with a compiler at hand.
"""

import sys

import deepspeed

from spo_kernels import cli

if __name__ == "__main__":
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    sys.exit(cli.main())
