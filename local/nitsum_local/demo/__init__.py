"""`make demo`: the main job, live.

A real control plane, the chart, operator, gateway, two agents, SGLang on CPU, and a mix of traffic that changes.
"""
