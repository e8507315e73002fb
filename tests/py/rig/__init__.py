"""What the demo and the SDK tests share: processes on loopback that stop when they should, and the way to talk to them.

Standard library only. Nothing here waits without a limit or sleeps in place of a check, and every process is ended by
its own id.
"""
