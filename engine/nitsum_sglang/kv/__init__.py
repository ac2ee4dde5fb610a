"""KV cache that outlives a layout: pages in memory, addressed by content and absolute KV head, so that any TP reads what another wrote."""
