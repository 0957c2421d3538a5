"""The verbs on parameter trees: init, split and join, merge, freeze, switches, reports."""
