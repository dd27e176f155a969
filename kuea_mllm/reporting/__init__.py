"""Terminal tables, figures and self-contained HTML reports.

Everything here renders plain data. Nothing is imported by the package itself: matplotlib is loaded
by `figures`, jinja2 by `html`, rich by `tables`.
"""
