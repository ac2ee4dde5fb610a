"""Imported first by a zygote: an SGLang that we do not know is named before anything is forked."""

from nitsum_sglang import touched

touched.check()
