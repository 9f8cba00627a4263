"""Speed and memory on this machine, compared with ceilings measured in the same run."""
