"""The server: one process for HTTP, one worker process per device, a queue with a journal between them.

``settings`` says where and within which limits; ``guard`` is what every HTTP message passes first; ``store``
keeps pictures and jobs on disk; ``queue`` decides which of the ``jobs`` is drawn next; ``workers`` starts and
restarts the processes of ``worker``, in which an Engine draws. ``native``, ``openai`` and ``a1111`` submit
the same :class:`~imprompt.schema.request.Request`; what they share is in ``protocols`` and ``bodies``.
"""
