"""Commands on a pseudo-terminal."""

import fcntl
import os
import pty
import re
import struct
import termios


def on_a_terminal(columns: int, *command: str, **environment: str) -> tuple[list[str], int]:
    """The lines that a command writes on a pseudo-terminal, without escapes, and its status.

    A line that is drawn again is several lines here.
    """
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe(command[0], command, {**os.environ, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8", **environment})
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    content = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        content += part
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", content.decode())
    return [line.rstrip() for line in re.split(r"[\r\n]+", text)], os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
