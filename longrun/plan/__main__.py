"""`python -m longrun.plan`; see `longrun.plan.command`."""

from longrun.interrupts import leave_at_once

leave_at_once()  # during the imports below

from longrun.plan.command import main  # noqa: E402

if __name__ == "__main__":
    main()
