"""Imported first by the zygote of fronts, as `preload_engine` is by that of engines."""

from nitsum_sglang import touched

touched.check((*touched.NAMES, *touched.FRONT_NAMES))
