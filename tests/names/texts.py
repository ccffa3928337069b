from hypothesis import strategies as st

# Any text that a JSON string can contain, including lone surrogates. Characters with a rule are more frequent.
TEXTS = st.text(
    st.one_of(st.sampled_from(" \t\n./@,aAéß\u0301\u200c\u200d\ufe0f\u200b\ud800\0❤🔥"), st.characters()), max_size=80
)
