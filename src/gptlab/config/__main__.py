from gptlab.config.layers import marks_as_markdown

print(marks_as_markdown())
