"""Logs of runs that something else trained, read as curves.

`gptlab.logs.read.read_logs` finds and reads them; each module below it reads one kind of log.
"""
