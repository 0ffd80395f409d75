"""Engines that several variants share: pure array functions that know no Flax."""
