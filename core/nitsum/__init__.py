"""nitsum's pure core: model facts, layouts, step times, demand, planner, flip machine, routing. No I/O, no clock, no asyncio.

Time enters as a value: `now` is seconds on a clock of the caller's choice that never runs backwards.
"""
