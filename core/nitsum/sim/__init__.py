"""A fleet under recorded or synthetic traffic, with the planner, router and ledger that production runs. Pure: time is a number.

workload -> arrivals (requests) -> fleet: lives of requests in gateways (routing) -> groups (ledger, engine) -> metrics. Beside them the
planner, whose plans agents carry out on nodes.
"""
