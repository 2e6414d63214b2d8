"""The demo: a small LLaVA learns to answer questions about real handwritten digits, with and without MODA.

``data`` holds the pictures and questions, ``tokenizer`` the words, ``model`` the network, ``train`` the recipe,
``evaluate`` what is measured, ``leak`` the experiment on ``context="all"``, ``run`` the order of events, ``picture``
and ``summary`` what is shown, and ``checkpoint`` the same look at a LLaVA checkpoint of the user's.
"""
