"""`python -m commonit_trl` is `commonit`: what the launchers (torchrun, accelerate, deepspeed) start."""

import sys

from commonit_trl.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
