"""accelerate launch, silent about a process that has said why it failed, and clear about one that could not.

    python -m firstsight.core.launch ... -m stages.distill

Ends with the status of the process that failed first.
"""

import logging
import os
import signal
import sys

# The status of a process that fails because another one has gone (EX_UNAVAILABLE of sysexits.h).
LOST = 69
_AGAIN = "run the stage again, which continues from what it has saved"


def main() -> int:
    """Launch, and return the exit status."""
    # Imported here, because stages import this module, but not all of them torch.
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)  # of the launcher alone: it reports each signal that it sends
    arguments = launch_command_parser().parse_args()
    if (arguments.num_machines or 1) > 1:
        arguments.machine_rank = int(os.environ["SLURM_NODEID"])  # each node's own, where the command is the same
    try:
        launch_command(arguments)
    except ChildFailedError as error:
        statuses = {rank: failure.exitcode for rank, failure in error.failures.items()}
        return ended(statuses)
    except SignalException as told:
        return 128 + told.sigval
    return 0


def ended(statuses: dict[int, int]) -> int:
    """Return the status with which a launcher ends whose processes have failed, and say what none of them has said.

    Args:
        statuses: by process, its exit status, or the negative number of the signal that killed it; in the order in
            which they ended, the last ones perhaps by the launcher.
    """
    process, status = next((one for one in statuses.items() if one[1] != LOST), (None, LOST))
    if process is None:
        print(f"error: other processes: expected them to run to the end, found them gone; {_AGAIN}", file=sys.stderr)
    elif status < 0:
        found = signal.Signals(-status).name
        if -status == signal.SIGKILL:
            found += " (out of memory?)"
        print(
            f"error: process {process}: expected it to run to the end, found it killed by {found}; {_AGAIN}",
            file=sys.stderr,
        )
        return 128 - status
    return status


if __name__ == "__main__":
    sys.exit(main())
