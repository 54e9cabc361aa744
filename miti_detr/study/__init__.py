"""Comparison of models: plan, runs, tables, figures and the report page."""
