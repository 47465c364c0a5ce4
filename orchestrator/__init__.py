"""Control plane of moegrid: from a grid file to finished cells. Never imports torch."""

__version__ = "0.1.0"
