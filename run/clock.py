"""The hours that a run has used, and where its schedules are: at its number of updates, or at its share of
--max_hours."""

import math
import time


class Clock:
    """The wall-clock hours of a run, over all its starts. Workers take the largest of their clocks, so that they stop
    after the same update and have the same learning rates."""

    def __init__(self, device, cfg):
        """cfg: a config.TrainConfig."""
        self.device, self.cfg = device, cfg
        self.restore(0.0)

    def restore(self, hours: float):
        """Continue after what earlier starts have used."""
        self.hours, self._began = hours, time.monotonic() - 3600 * hours

    def now(self) -> float:
        """Hours used, by this worker's clock."""
        return (time.monotonic() - self._began) / 3600

    def look(self):
        """Bring `hours` up to now. In between it does not change, so that everything in an update reads the same."""
        self.hours = self.now()
        if self.cfg.max_hours:
            self.hours = self.device.agree([int(3.6e6 * self.hours)])[0] / 3.6e6  # milliseconds

    @property
    def goes_by_hours(self) -> bool:
        return self.cfg.schedule_by == "hours"

    @property
    def last_update(self) -> float:
        """The update with which the run ends at the latest (inf: that is not known)."""
        return math.inf if self.goes_by_hours else self.cfg.max_update

    @property
    def left(self) -> float:
        """Seconds until --max_hours have passed (inf: there is no such limit)."""
        return 3600 * (self.cfg.max_hours - self.hours) if self.cfg.max_hours else math.inf

    def at(self, updates: int) -> float:
        """Where the schedules are after so many updates: there, or, by the hours, at their share of max_update."""
        return (
            self.cfg.max_update * self.hours / self.cfg.max_hours if self.goes_by_hours else updates
        )
