"""Every contract that crosses a process or a disk: specs, Arrow table schemas, the run record, errors."""
