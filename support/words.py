"""Words that say whether a sentence ends, as alternatives of a pattern.

    titles     a name follows their full stop
    numbered   a number follows their full stop
    shortened  other abbreviations, in any case: a sentence may end at their full stop
    first      words that open a sentence
"""

WORDS = {
    "titles": "Mr|Mrs|Ms|Mx|Drs?|Prof|St|Mt|Ft|Gen|Col|Maj|Capt|Cmdr|Lt|Sgt|Cpl|Adm|Sen|Rep|Gov|"
    r"Pres|Rev|Hon|Messrs|Mme|Mlle|Fr|Hrn?|Sra|Srta|Dña|Sig|Dott|Ing|dhr|mevr|vs|cf|viz|e\.g|i\.e|"
    r"z\.B|d\.h|PS|P\.S|ул|им|проф",
    "numbered": "nos?|n°|figs?|vols?|ch|chap|sec|sect|art|eq|abs|kap|núm|pág|cap|mar|jun|tel",
    "shortened": "co|inc|corp|bros|esq|etc|al|dept|est|approx|ave|univ|assn|usw|evtl|inkl|engl|"
    "griech|aprox|resp|esim|bijv|prof|sig|dott|jan|feb|apr|jul|aug|sept?|oct|nov|dec",
    "first": "the|a|an|he|she|they|we|you|i|this|that|these|those|there|what|when|where|why|who|"
    "how|did|do|does|is|are|was|if|in|on|at|but|and|so|for|please|his|her|my|our|your|as|to|no|not|"
    "or|just|also|maybe|all|some|after|before|then|now|even|since|because|however|although|though|"
    "while|once|its?|im|https?|der|die|das|er|sie|es|wir|el|los|las|les?|il|он|она|они|в|на|и|но",
}
