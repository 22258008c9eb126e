"""What works on the units of an encoding: this process, or a cluster's."""

from ovi.data.launchers import local, ray
from ovi.data.launchers.base import LAUNCHERS, Launcher, Unit, Worker

__all__ = ["LAUNCHERS", "Launcher", "Unit", "Worker", "local", "ray"]
