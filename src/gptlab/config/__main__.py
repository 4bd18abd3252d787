from gptlab.config.flags import marks_as_markdown

print(marks_as_markdown())
