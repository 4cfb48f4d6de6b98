"""Words that say whether a sentence ends, of several languages and fields.

    titles     a name follows their full stop; their case counts
    numbered   a number follows their full stop, or a bracket: `Fig. 2`, `ref. [4]`
    shortened  other abbreviations: a sentence may end at their full stop; in any case, but for
               CAPITALS, which are words if their case does not count, as `Am.`, `Fed.`
    vowelless  short words without a vowel: most are abbreviations, as `Ltd`, `pp`, `стр`. Those in
               `index.html` and `5 kg` are not
    first      words that open a sentence, in any case
"""

import regex

TITLES = """
Mr Mrs Ms Mx Dr Drs Prof St Mt Ft Gen Col Maj Capt Cmdr Cdr Lt Sgt Cpl Pvt Pfc Brig Adm Supt Insp
Sen Rep Gov Pres Amb Atty Rev Revd Hon Messrs vs cf viz e.g i.e PS P.S
Mme Mmes Mlle MM Mgr Fr Hr Hrn Frl z.B d.h bzw Dipl Sra Srta Sres Dña Dra Profa Exmo Exma Ilmo
Sig Dott Ing Avv Geom Arch Rag dhr mevr mej jhr Ir ds
Ul ul inż mgr hab im św ks MUDr JUDr PhDr RNDr PaedDr MVDr ThDr PharmDr ICDr nám tř
ул им проф акад доц инж тов г-н г-жа св просп пер пл вул ім Doç Av Sn Öğr κ κα Δρ özv ifj Jl Ny
श्री श्रीमती सुश्री श्रीमान डॉ डा प्रो पं स्व सौ कु ডা মো শ্রী ড অধ্যাপক શ્રી ડૉ ડો ਸ ਡਾ
திரு திருமதி டாக்டர் శ్రీ శ్రీమతి డా ಶ್ರೀ ಡಾ ശ്രീ ഡോ
"""
NUMBERED = """
no nos num fig figs vol vols ch chap chaps sec secs sect art arts eq eqs ref refs tab tabs cap caps
app apps appx ex exs op pt pts pl col cols par para paras bk ver ed edn ser suppl sched exh cl reg
max min avg temp sat pos pulse resp conc tel fax ext rm apt ste bldg mar jun mon tue tues wed thu
thur thurs fri sun theorem thm lem prop cor def stat
gen exod lev deut josh judg sam kgs chron neh esth prov eccl isa jer ezek dan hos obad zeph hag zech
mal matt rom gal eph phil thess tim philem heb jas pet rev
n° abs kap abb bd aufl ziff rn anm jg núm pág págs séc vers pag pagg artt sez tav blz hfst afb
ust pkt poz rozdz rys čl odst písm obr příl гл разд рис табл вып корп кв оф каб md sf σελ αρ εικ
"""
SHORTENED = """
co inc corp bros esq etc al dept est approx ave univ assn assoc intl govt div mfg pty pte sdn bhd
blvd hwy pkwy jan feb apr jul aug sep sept oct nov dec misc incl excl orig transl repr illus
eds doc ibid fasc prof
cir civ supp evid crim proc const bankr dist dkt jud
abd bilat diag hx subsp
usw evtl inkl exkl engl griech geb gest ggf vgl sog allg bes jh mio mrd hrsg u.a o.ä
env apr av p.ex aprox pról ltda cía eng ecc dott sig sig.ra dott.ssa prof.ssa bijv enz o.a d.w.z
i.p.v t.ex bl.a osv f.eks f.d m.m esim ym jne klo vrt
itd itp tzn tzw tj m.in godz woj os tys mln mld okr nám atd apod např tzv npr
т.е т.д т.п др напр обл руб коп млн млрд тыс тис ін див р-н
örn bkz vb sok mah stb ún kb ker utca π.χ δηλ βλ κτλ κλπ dll dsb tgl hlm
प्रा लि कं रु क्र ता जि लिमि ला লি টা লিঃ લિ રૂ ప్రై లి ಲಿ லிட்
"""
CAPITALS = """
Am App Ala Ariz Cal Calif Colo Conn Fla Ill Mich Minn Mont Neb Nev Okla Tenn Tex Wis Wyo
Fed Admin Cert Aff Amend Asst Pet Resp Ste Cad Sok Mah AA CC DD EE FF HH JJ OO PP RR UU
"""
FIRST = """
the a an he she they we you i this that these those there what when where why who how did do does is
are was if in on at but and so for please his her my our your as to no not or just also maybe all
some after before then now even since because however although though while once it its im http
https der die das er sie es wir el los las le les il он она они в на и но
"""
CONSONANT = "[b-df-hj-np-tv-xzçćčďđğłńňñřśšşťžźżб-джзй-нп-тф-щ]"


def pattern(words: str) -> str:
    """The words as alternatives. Those with the same last letter share it: a pattern that reads
    backwards tries a few of them only."""
    ends = {}
    for word in map(regex.escape, words.split()):
        ends.setdefault(word[-1], []).append(word[:-1])
    return "|".join(f"(?:{'|'.join(begun)}){end}" for end, begun in ends.items())


WORDS = {
    "titles": pattern(TITLES),
    "numbered": pattern(NUMBERED),
    "shortened": f"(?i:{pattern(SHORTENED)})|{pattern(CAPITALS)}",
    "vowelless": rf"(?<![^\s(\"“]|\p{{N}}\s)(?i:{CONSONANT}){CONSONANT}{{1,4}}",
    "first": "|".join(FIRST.split()),
}
