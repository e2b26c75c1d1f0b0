"""Runs a command in a terminal of its own, types a line when it shows a text, and says what came of it.
Arguments: the text, the line, the command."""

import os
import pty
import sys

TEXT, LINE, COMMAND = sys.argv[1], sys.argv[2], sys.argv[3:]
process, terminal = pty.fork()
if process == 0:
    os.execv(COMMAND[0], COMMAND)
shown, typed = b"", False
while True:
    try:
        piece = os.read(terminal, 1024)
    except OSError:
        break
    if not piece:
        break
    shown += piece
    if not typed and TEXT.encode() in shown:
        os.write(terminal, LINE.encode() + b"\n")
        typed = True
_, status = os.waitpid(process, 0)
print(typed, LINE.encode() in shown, "exit", os.waitstatus_to_exitcode(status))
