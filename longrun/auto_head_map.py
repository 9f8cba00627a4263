"""`--head-map auto`: a head map measured once a model, without training, and kept in the user's cache folder."""

from __future__ import annotations
