"""torchrun with exit codes that mean something: ``python -m tunemill.train.launch`` takes its options.

torchrun itself returns 1 whatever ended its processes, so a cluster could not tell bad data, which
no retry mends, from a preempted node. Here the code is that of the process that failed first, and
143 or 130 after a signal.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from tunemill.errors import Interrupted, Stopped, TransientError

SAVING_SECONDS = 3600  # after a signal torchrun kills in 30; who sent it knows how long saving may take

log = logging.getLogger("tunemill")


def main(arguments: Sequence[str]) -> int:
    """Run torchrun and return the exit code of what it started."""
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    logging.basicConfig(format="%(message)s")
    try:
        _torchrun(arguments)
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        log.error("tunemill: process %d ended first, with exit code %d", rank, first.exitcode)
        return first.exitcode if first.exitcode > 0 else TransientError.exit_code  # negative: killed
    except SignalException as error:
        return Interrupted.exit_code if error.sigval == signal.SIGINT else Stopped.exit_code
    except (DistError, RendezvousError) as error:
        log.error("tunemill: the nodes cannot meet: %s", " ".join(str(error).split())[:200])
        return TransientError.exit_code
    return 0


def _torchrun(arguments: Sequence[str]) -> None:
    import torch.distributed.run as torchrun

    # Else one store outlives restarts, and a restarted process may find a dead one's address in it.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    untyped: Any = torchrun
    parser = untyped.get_args_parser()
    parser.allow_abbrev = False  # else the command's own --run is taken for torchrun's --run-path
    if parser.get_default("shutdown_timeout") is None:
        parser.set_defaults(shutdown_timeout=SAVING_SECONDS)
    options = parser.parse_args(list(arguments))
    if options.nnodes in (None, "1", "1:1") and not options.rdzv_endpoint:
        options.standalone = True  # else two trainings on a machine would meet at the same port
    untyped.run(options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
