"""Files that one process holds at a time: the system lets go of them when it ends, however."""

import os
import sys

if sys.platform == "win32":
    import msvcrt

    def hold(descriptor: int) -> None:
        """Hold an open file until it is closed. OSError when somebody else does, or when the file
        system knows no locks."""
        # Far behind the text, so that others may read who holds it.
        os.lseek(descriptor, 1 << 20, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        os.lseek(descriptor, 0, os.SEEK_SET)

else:
    import fcntl

    def hold(descriptor: int) -> None:
        """Hold an open file until it is closed. OSError when somebody else does, or when the file
        system knows no locks."""
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
