"""Analysis: from an ATen graph to a Plan, by data flow alone."""
