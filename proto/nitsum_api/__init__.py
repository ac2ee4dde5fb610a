"""Contracts between nitsum's parts. Both sides of a call name this version; a peer with another one is reported and left alone."""

CONTRACT_VERSION = "v1alpha1.1"
