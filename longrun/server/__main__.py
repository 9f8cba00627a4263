"""`python -m longrun.server`; see `longrun.server.command`."""

from longrun.interrupts import leave_at_once

leave_at_once()  # during the imports below

from longrun.server.command import main  # noqa: E402

if __name__ == "__main__":
    main()
