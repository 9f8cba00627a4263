"""Speed and memory on this machine, beside ceilings measured in the same run."""
