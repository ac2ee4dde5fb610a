"""A fleet under recorded or synthetic traffic, with the planner, router and ledger that production runs. Pure: time is a number.

workload -> arrivals (requests) -> fleet: gateways (routing) -> groups (ledger, engine) -> metrics.
"""
