r"""Which answers count as equal, by kind: other spellings are equal, near misses and hedges are not.

Each line is `reference == answer` or `reference != answer`, both as written in a `\boxed{}`.
"""

from __future__ import annotations

import pytest

from kdrl_mcore.reward.equivalence import equivalent

EQUAL = r"""
# e-notation
2.5e-4 == 0.00025
1.5E+3 == 1500
6.02e23 == 6.02 \times 10^{23}
6.02e23 == 6.02\cdot 10^{23}
6.02e23 == 6.02*10^23
6.02e23 == 6.02 x 10^{23}
6.02e23 == 602 \times 10^{21}
1e-9 == 10^{-9}
10^{-9} == 1e-9
3e8 == 3\times10^8\text{ m/s}
3e8 == 300,000,000
4.5e33 == 4.5e+33
-2.5e-3 == -0.0025
1e5 == 10^5
9.4e-1 == 0.94
3.0e8 == 3\times 10^{8}
2e3 == 2000
7.5e7 Hz == 7.5 \times 10^7
1.602e-19 == 1.602\times10^{-19}\mathrm{C}
5e-10 == 5\times10^{−10}
5e-10 == 5×10⁻¹⁰
2.0e-2 == \frac{1}{50}
1e2 == 100.0
3.3e4 == 33000
3.3e4 == 33{,}000
8e3 == 8000 N
# unicode
90^\circ == 90º
-3 == −3
-3 == —3
x^2 == x²
x^{10} == x¹⁰
2\pi == 2π
\frac{1}{3} == ⅓
3\frac{1}{2} == 3½
\sqrt{5} == √5
\sqrt{x+1} == √(x+1)
x \le 3 == x≤3
25 == ２５
25 == ٢٥
25 == २५
3,5 == 3，5
3,5 == 3、5
(1,2] == （1，2]
50% == 50％
10 == 10。
10 == 「10」
1/2 == １／２
x_1 == x₁
12 == 𝟏𝟐
a=1 == a＝1
5 == 5个
5 == 5厘米
50000 == 5万
[0,\infty) == [0,∞)
\{1,2\} == ｛1，2｝
3.14 == 3．14
\alpha == α
\theta == θ
2\times 3 == 2×3
\emptyset == ∅
\mathbb{Z} == ℤ
x\ge 2 == x⩾2
\sqrt[3]{2} == ∛2
1:2 == 1∶2
60^\circ == 60˚
a\cdot b == a·b
6 == 12÷2
\pm 2 == ±2
1/2 == 1⁄2
5 == 5 ℃
-\infty == −∞
C == Ⓒ
\triangle ABC == △ABC
# units
5 == 5 kg
5 == 5kg
5 == 5 m
5 == 5\text{m}
5 == 5\,\mathrm{cm}
12 == 12 square units
12 == 12\text{ cm}^2
12 == 12 cm^2
12 == 12 \mathrm{cm}^{2}
12 \text{ cm}^2 == 12 \text{ square centimeters}
12 == 12\text{ in}^3
60 == 60 miles per hour
60 mph == 60 \text{ miles per hour}
9.8 == 9.8 m/s^2
9.8 == 9.8\ \mathrm{m/s^2}
18 == 18 dollars
18 == USD 18
18 == US\$18
18 == Rs. 18
18 == £18
18.50 == \$18.50
18 == \$ 18
1,200 == \$1,200
1200 == 1,200 dollars
1200 == \$1200.00
5 == 5 apples
5 == 5 students
5 == 5 hours
5 == 5 hrs
15 == 15 minutes
3 == 3 years old
7 == 7 ways
7 == 7 \text{ different ways}
12 inches == 12
5 == 5 ft
5 ft == 5 feet
5 liters == 5 L
100 == 100 ml
25 == 25¢
25 == 25 cents
90 == 90 deg
90 degrees == 90^\circ
36 == 36 sq. ft.
5 == 5 percent
3 == 3 times
4 == 4 points
10 == 10 points
2 == 2 moles
5 == 5 m^3
20 == 20 people per day
5 == five
5 == \text{five}
25 == twenty-five
12 == Twelve
5 \text{ million} == 5,000,000
5 \text{ million} == 5\times 10^6
2.5 million == 2500000
3 hundred == 300
5 == 5 units
8 == 8 pounds
8 lbs == 8 pounds
# text
5 == 5 \text{ (cm)}
x=5 == x=5 \text{ only}
\text{yes} == Yes
no solution == \text{No solution}
\text{odd} == odd
3 \text{ and } 4 == 3,4
3 \text{ or } 4 == \{3,4\}
\text{Monday} == Monday
\text{Saturday} == Saturday.
5 == \text{The answer is } 5
2x+1 == 2x+1 \text{ for all } x
n=3k == n=3k \text{ where } k \text{ is an integer}
\frac{3}{4} == \frac{3}{4} \text{ of the cake}
x=2k\pi == x=2k\pi, k\in\mathbb{Z}
\text{(2, 3)} == (2,3)
3 \text{ hours } 20 \text{ minutes} == 3 hours and 20 minutes
3 \text{ hr } 20 \text{ min} == 3\text{ hours }20\text{ minutes}
6:00 \text{ PM} == 6:00 p.m.
\text{even} == \text{Even}
\text{all real numbers} == \mathbb{R}
(-\infty,\infty) == \text{all real numbers}
\infty == infinity
\text{A} == A
\text{point } C == \text{Point C}
\text{June 20} == June 20
5 == 5 \quad \text{(five)}
# mixed
2 1/4 == 2.25
2 1/4 == \frac{9}{4}
2\frac{1}{4} == 9/4
2 \frac14 == 2.25
-2 1/4 == -\frac{9}{4}
1 1/2 == 1.5
5 3/8 == \frac{43}{8}
10 2/3 == \frac{32}{3}
3 1/2 \text{ hours} == 3.5
2\tfrac{1}{3} == \frac73
2\dfrac{1}{3} == 7/3
33 1/3\% == 33\frac13\%
4\frac{1}{2}\text{ cups} == 4.5
\frac{7}{2} == 3 1/2
3\ 1/2 == 3.5
3~\frac{1}{2} == 3.5
# lists
1,234,567 == 1234567
1 234 567 == 1234567
1234 == 1{,}234
3, 5 == 3,5
3;5 == 3,5
3 and 5 == 5, 3
1000, 2000 == 1,000, 2,000
1,000, 2,000 == 1000, 2000
1,000 and 2,000 == 1000, 2000
$1$, $2$, $3$ == 1,2,3
$1$ and $2$ == 1,2
[1, 2, 3] == 1,2,3
(1,2),(3,4) == (3,4), (1,2)
x=1,x=2 == 1,2
x_1=1, x_2=2 == 1, 2
a=1, b=2 == (1,2)
100,200 == 100, 200
100, 200 == 100,200
\{100,200\} == \{100, 200\}
12, 345 == 12,345
1, 2, ..., 10 == 1, 2, \ldots, 10
-1,0,1 == \{-1,0,1\}
2 \text{ and } 3 == x=2 \text{ or } x=3
(5, 10) == (5,10)
1,100 == 1, 100
7 == {7}
\{7\} == 7
123,456,789 == 123456789
(x,y)=(1,2) or (3,4) == (1,2),(3,4)
0.5, 0.25 == \frac12, \frac14
-5, 5 == \pm 5
5, -5 == \pm 5
x=\pm 5 == 5,-5
\pm\sqrt2 == \sqrt2,-\sqrt2
2\pm\sqrt3 == 2+\sqrt3, 2-\sqrt3
p=5,q=2;p=7,q=2 == (5,2),(7,2)
(5,2),(7,2) == p=5,q=2 \text{ or } p=7,q=2
# intervals
(2,\infty) == 2<x
(2,\infty) == x \in (2,+\infty)
x>2 == x\in(2,\infty)
[2,5] == 2\le x\le 5
[2,5] == 5 \ge x \ge 2
(-\infty,3] == x\le 3
x\le3 == (-\infty, 3]
(-\infty,-1)\cup(3,\infty) == x<-1 \text{ or } x>3
x<-1 \text{ or } x>3 == x>3 \text{ or } x<-1
x\in[0,1] == 0\le x\le1
\{x | x>2\} == (2,\infty)
\{x : x>2\} == x>2
\{x \mid 0 < x < 1\} == (0,1)
\{x\in\mathbb{R} : x \neq 1\} == x\ne1
\mathbb{R}\setminus\{1\} == x\neq 1
(-\infty,1)\cup(1,\infty) == \mathbb{R}\setminus\{1\}
(0,1)\cup(1,2) == (1,2)\cup(0,1)
0<a<1 == a\in(0,1)
k\ge -\frac14 == [-\frac14,\infty)
[-\sqrt2,\sqrt2] == -\sqrt{2}\le x\le\sqrt{2}
(-1,3) == x>-1 \text{ and } x<3
(-2,2) == |x|<2
[1,\infty) == [1,+\infty)
(0, \frac{\pi}{2}) == 0<\theta<\frac{\pi}{2}
m > 1 == (1, \infty)
x\geq 0.5 == [1/2,\infty)
\left[\frac12, 1\right) == \frac{1}{2} \leq x < 1
x \in \mathbb{R} == (-\infty,\infty)
(-\infty, 2) \cup (2, \infty) == x \ne 2
2 < x \le 5 == (2,5]
\emptyset == \{\}
\emptyset == \varnothing
# equation
12 == 3\cdot4=12
12 == x=12
12 == a+b=12
12 == x=3\cdot 4=12
12 == f(2)=12
12 == S_{10}=12
\frac12 == P=\frac12
\frac12 == P(A)=0.5
x=12 == 12
y=x+1 == y=1+x
y=x+1 == x+1
x^2+y^2=1 == x^2+y^2-1=0
x+y=1 == 2x+2y=2
5 == |AB|=5
30 == \angle ABC = 30^\circ
12 == \text{Area}=12
6 == AB = 6
8 == 2^3=8
f(x)=x^2 == f(x)=x^2
f(n)=2n == f(x)=2x
f(x)=2x+1 == 2x+1
12 == \text{Total} = 7+5 = 12
0.5 == \frac{1}{2} = 0.5
\frac{1}{3} == \frac13 \approx 0.333
0.33 == \frac{1}{3}\approx 0.33
3.14 == \approx 3.14
9 == x + y = 4 + 5 = 9
1+\sqrt2 == x = 1+\sqrt{2}
# latex
\frac{1}{2} == \frac12
\frac{1}{2} == \tfrac{1}{2}
\frac{\sqrt3}{2} == \sqrt{3}/2
\frac{\sqrt{3}}{2} == \frac{\sqrt3}2
5 == \mathbf{5}
5 == \boldsymbol{5}
5 == `5`
5 == $5$
5 == \(5\)
5 == \[5\]
5 == $$5$$
5 == *5*
5 == 5 \\
5 == 5\;
5 == \ 5
5 == \left(5\right)
5 == \boxed{5}
5 == \fbox{5}
5 == \large 5
5 == \color{red}{5}
5 == {\bf 5}
0.\overline{3} == \frac13
0.\overline{142857} == \frac17
1.2\overline{3} == \frac{37}{30}
0.\dot{3} == \frac13
0.333\ldots == \frac13
\cos 60^\circ == \frac12
\sin(30^\circ) == 0.5
\tan 60^\circ == \sqrt3
e^{i\pi/2} == i
e^{2\pi i} == 1
1+i == 1+\mathrm{i}
e^2 == \mathrm{e}^2
\ln 2 == \ln(2)
2^{-1} == \frac12
-\frac32 == -3/2
-\frac{3}{2} == \frac{3}{-2}
\sqrt[3]{8} == 2
8^{1/3} == 2
\binom{5}{2} == 10
5! == 120
|-5| == 5
\log_{10}100 == 2
\lceil 2.1 \rceil == 3
x(x+1) == x^2+x
(A) 12 == (A)
(A) 12 == 12
B == (B) 7
B == \textbf{B}
D == \mathrm{(D)}\ 4
(C) == C. 5
\text{(E)} == E
\dfrac{a}{b} == a/b
\sqrt{12} == 2\sqrt{3}
\frac{2}{\sqrt{2}} == \sqrt 2
0.5 == \frac{1}{2}
2.50 == 2.5
.5 == 0.5
5. == 5
+5 == 5
\cot 45^\circ == 1
3 \pi == \pi \cdot 3
\begin{pmatrix}1\\2\end{pmatrix} == \begin{bmatrix} 1 \\ 2 \end{bmatrix}
\left(\begin{array}{c}1\\2\end{array}\right) == \begin{pmatrix}1\\2\end{pmatrix}
\langle 1,2 \rangle == (1,2)
P(1,2) == (1,2)
A(1,2) == A=(1,2)
36^\circ 30' == 36.5^\circ
1:2 == \frac12
4:2 == 2:1
2^{10} == 1024
10^{2} == 100
1-2^{-60} == 1-\frac{1}{2^{60}}
\frac{1}{2004!} == \frac{1}{2004!}
\sum_{k=1}^{3} k == 6
\int_0^1 x dx == \frac12
\lim_{n\to\infty}\frac1n == 0
2\sqrt{3} == 2 \sqrt 3
\frac{x}{y} == x/y
x y == yx
3xy == 3yx
\overline{AB} == \overline{AB}
-x^2 == -(x^2)
a^b == a^{b}
2\cdot 10^5 == 200000
\$5 == 5
100\% == 1
12.5\% == 0.125
12.5\% == \frac18
3\sqrt{2}+1 == 1+3\sqrt{2}
(2\sqrt{3},4) == (2\sqrt3,4)
\cos\theta == \cos(\theta)
\sin^2 x == (\sin x)^2
\arctan 1 == \frac{\pi}{4}
\tan^{-1}(1) == \frac{\pi}{4}
# bases
1010_2 == 1010_{2}
1010_2 == 1010
1A3_{16} == 1a3_{16}
(1010)_2 == 1010_2
1010_{\text{two}} == 1010_2
132_{5} == 132_{\text{five}}
1010_2 == 1010 base 2
10_{10} == 10
# words
BACD == \text{BACD}
BACD == B A C D
HHT == \text{HHT}
Alice == alice
xy == yx
2ab == 2ba
ab^2 == b^2a
# brackets, arguments without braces, inverse functions
(2,5) == ]2,5[
[2,5) == [2,5[
(-\infty,1] == ]-\infty,1]
(-\infty,1) \cup (2,3] == ]-\infty,1[ \cup ]2,3]
[[1,2],3] == [[1,2],3]
\frac{\pi}{2} == \frac\pi2
\frac{\pi}{2} == \frac{\pi}2
\frac{\sqrt{3}}{2} == \frac\sqrt32
\frac{1}{\frac23} == \frac32
\frac{\pi}{2} == \cos^{-1}0
\frac{\pi}{4} == \tan^{-1} 1
10 == {5 \choose 2}
10 == 5 \choose 2
2 == \lg 100
9.11e-31 == 9.11\mathrm{e}{-31}
3.5 == 3 and 1/2
3:4 == 3 \text{ to } 4
3:4 == 3 to 4
1, 2 == x \in \{1, 2\}
-3 \le x \le 3 == |x| \le 3
x \ne 3 == \text{all real numbers except } 3
\mathbb{Z} == \text{all integers}
y = 2x == f(x) = 2x
# marks that mean nothing
5 == 5?
5 == 5\checkmark
5 == \underline{5}
# words, figures and currencies
circle == \text{a circle}
\text{Ellipse} == \text{An ellipse}
\text{No solution} == no solutions
\emptyset == \text{no solution}
\{\} == \text{no real solutions}
-\infty == \text{negative infinity}
\text{DNE} == \text{does not exist}
\text{Alice and Bob} == \text{Bob and Alice}
\text{I, II} == I and II
ABC == \triangle ABC
AB == \overline{AB}
7^{th} == 7^{\text{th}}
50\text{ mph} == 50 \frac{\text{miles}}{\text{hour}}
9.8\text{ m/s}^2 == 9.8 \frac{m}{s^2}
75¢ == \$0.75
5 == \text{(A) }5
A == Option A
A == \text{Option A}
"""
NOT_PRINTED = [("10", "\ufeff10"), ("1000", "1\u202f000"), ("1000", "1\u2009000"), ("5", "5\\ ")]

DIFFERENT = r"""
# e-notation
2.5e-4 != 0.0025
1e5 != 10^6
6.02e23 != 6.02e22
6.02e23 != 6.03\times10^{23}
6.02e23 != 6.02
1e-9 != 1e-8
1e-9 != 0
3e8 != 3
3e8 != 8
1e10 != 1e9
7.5e7 != 7.5e-7
7.5e7 != -7.5e7
5e3 != 5e^3
2.9979e8 != 3e8
# unicode
-3 != 3
x^2 != x2
25 != ２６
\frac12 != ⅓
3\frac12 != ½
90^\circ != 91°
12 != １２３
2^3 != 23
x^2 != x³
5万 != 5
\sqrt{5} != √6
# units
5 != 5 million
5 != 5 thousand dollars
5 != 5 dozen
5 != at least 5
5 != more than 5
5 != about 5
5 != 5 or more
5 != less than 5
5 != not 5
5 cm != 5 m
5 cm != 6 cm
5 kg != 5 lbs
60 mph != 60 km/h
12 cm^2 != 12 cm^3
12 cm^2 != 12 cm
5 dollars != 5 euros
18 eggs != 19 eggs
3 hours != 3 minutes
5 != 5x
5 != 5a
5 != 5 squared
25 != 5 squared
5 != 5 cubed
five != 6
5 != fifty
5 != half of 5
5 != twice 5
5 != 5 and a half
5 != 5 to 6
5 != between 4 and 6
5 != 5-6
\$5 != \$6
5 million != 5 billion
5 != 5 hundred
20 != 20 + C
5 != minus 5
# text
5 \text{ north} != 5 \text{ south}
\text{yes} != \text{no}
3 \text{ PM} != 3 \text{ AM}
x=1 \text{ and } y=2 != x=2 \text{ and } y=1
3 \text{ boys}, 5 \text{ girls} != 5 \text{ boys}, 3 \text{ girls}
5 != 5 \text{ or } 6
5 != 5 \text{ and } 6
n \text{ is odd} != n \text{ is even}
\text{increasing} != \text{decreasing}
\text{all positive integers} != \text{all integers}
3 \text{ hours } 20 \text{ min} != 3 \text{ hours}
3 \text{ hours } 20 \text{ min} != 20
4\text{ R }3 != 4
12 != \text{12 or 13}
12 != either 12 or 13
\text{Monday} != \text{Tuesday}
no solution != 0
\text{true} != \text{false}
2x+1 != 2x+1 \text{ or } 2x-1
5 != \text{The answer is not } 5
5 != I think it is 5 but maybe 6
answer != 42
42 != answer
42 != the answer
42 != \text{answer}
42 != ...
42 != ?
42 != \ldots
42 != x
7 != 7 \text{ remainder } 3
\text{rectangle} != \text{square}
# mixed
2 1/4 != 2
2 1/4 != 1/4
2 1/4 != 21/4
2 1/4 != \frac{2}{4}
2 1/4 != 2.5
3\frac12 != \frac32
-2 1/4 != -1.75
21 != 2 1
12 != 1 2
5 2 != 10
5 2 != 7
3 1/2 != 3 1/3
# lists
1,2 != 1
1,2 != 2
1,2 != 12
1,2 != 1.2
1,2 != 1,3
1,2,3 != 1,2
1,2 != 1,2,3
(1,2) != (2,1)
(1,2,3) != (3,2,1)
1,234 != 1,235
12, 345 != 12345
1234 != 1, 234
1,2 != 3
1,2 != \{1,2,3\}
x=1,y=2 != x=2,y=1
x=1, x=2 != x=1
\pm 5 != 5
5 != \pm 5
\pm 5 != -5
1 != 1,2
1 != 1 \text{ or } 2
(1,2) != \{1,2\}
(1,2),(3,4) != (1,2),(4,3)
(1,2) != 1
2\pm\sqrt3 != 2+\sqrt3
[1,2] != (1,2)
0,1 != (0,1]
3, 4, 5 != 3, 4
a=1,b=2 != 2,1
1;2 != 1;3
1000 != 1,00
100,200 != 100200, 1
1,2,3,4,5 != 1,2,3,4,6
5 != 1,2,3,4,5,6,7,8,9
(5,2),(7,2) != p=2,q=5;p=2,q=7
# intervals
(2,\infty) != x\ge2
(2,\infty) != x<2
[2,5] != 2<x<5
(2,5) != 2\le x\le5
(-1,3) != x>-1
x>2 != 2
2 != x>2
x\ge2 != 2
(0,1) != [0,1]
(0,1) != (0,2)
(0,1) != 0,1,2
(-\infty,1)\cup(2,\infty) != (-\infty,1)
x<-1 \text{ or } x>3 != -1<x<3
x \ne 1 != x=1
x \ne 1 != 1
\mathbb{R} != (0,\infty)
\mathbb{R} != \mathbb{Z}
\emptyset != 0
0 != \emptyset
x>2 != y>2
x>2 != x>3
[0,3) != [0,3]
[0,3) != 0
5 != 4.9<x<5.1
5 != x\in\mathbb{R}
5 != [5,6]
(0,1) != \mathbb{R}
5 != (-\infty,\infty)
# equation
12 != 11=12
12 != 12=11
12 != 5+6=12
8 != 2^4=8
12 != x=11=12
x=12 != 11=12
12 != 12=12=13
y=x+1 != y=x-1
x+y=1 != x-y=1
x=1 != y=1
x^2+y^2=1 != 1
x^2+y^2=0 != 0
3x-y=0 != 0
12 != a=12,b=13
\frac12 != \frac12=\frac13
5 != 1=2=5
f(x)=2x != f(x)=3x
f(x)=2x != g(x)=2x
0 != 1-1=1=0
5 != 5=6
7 != 3+4=8
# latex
\frac12 != \frac13
\sqrt2 != \sqrt3
\sqrt2 != 2
\sqrt2 != 1.41
\pi != 3.14159
\pi != 22/7
\frac13 != 0.33
\frac13 != 0.333
\frac13 != 0.3333
0.\overline{3} != 0.3
0.\overline{3} != 0.\overline{4}
2x != 2
2x != x^2
x^2 != x^3
(x+1)^2 != x^2+1
2^{100} != 2^{99}
e^{i\pi} != 1
i != -i
\sin x != \cos x
\log_2 8 != \log_3 8
\sin 30^\circ != \frac{\sqrt3}{2}
A != B
(A) 12 != (B) 12
(A) 12 != 13
(A) 12 != (A) 13
B != (C) 7
5 != -5
5 != 5.1
5 != 5.0000001
5 != 50
5 != 0.5
5 != 5\%x
5 != 5!
5 != 5^2
5 != |5
\begin{pmatrix}1\\2\end{pmatrix} != \begin{pmatrix}2\\1\end{pmatrix}
\begin{pmatrix}1&2\end{pmatrix} != \begin{pmatrix}1\\2\end{pmatrix}
1:2 != 2:1
12:30 != 12:31
12:30 != 12
1:30 != 3:90
x+1 != x+2
2x+1 != 2y+1
a+b != a-b
0.1 != 0.01
10\% != 0.2
50\% != 5
10^{-7} != 2\cdot 10^{-7}
0.0000001 != 0
\frac{1}{10^{50}} != 0
10^{50} != 10^{50}+1
100! != 100!+1
\frac{1}{2004!} != \frac{1}{2005!}
\frac{1}{2004!} != 0
2^{-60} != 0
1-10^{-30} != 1
\sqrt{2}+10^{-20} != \sqrt{2}
10^{-20}x != 2\cdot10^{-20}x
1.6\times10^{-19} != 1.7\times10^{-19}
P(1,2) != (2,1)
36^\circ 30' != 36^\circ
-\frac{1}{2} != \frac12
1 != \infty
\infty != -\infty
\infty != 0
# bases
1010_2 != 1011_2
1010_2 != 1010_3
1010_2 != 10
12_{5} != 12_{6}
4210_{5} != 4210_{6}
1A_{16} != 1B_{16}
# words
BACD != ABCD
eat != tea
HHT != THH
no != on
ACB != ABC
Alice != Bob
stop != pots
B A C != A B C
NOON != NONO
abc != cab
A != a b
ABC != AB
# words, figures, currencies and statements that are false
circle != an ellipse
\text{Alice and Bob} != \text{Alice and Carol}
\text{no solution} != 0
\infty != \text{negative infinity}
\text{does not exist} != \text{exists}
\text{all integers} != \text{all real numbers}
\triangle ABC != ABD
\triangle ABC != \angle ABC
75¢ != \$75
€5 != \$5
5 dollars != 5 euros
\frac{1}{3} != \frac13 \approx 0.25
\sqrt{2} != \sqrt{2} \approx 1.6
1101_2 != 1101_1
(3,\frac{\pi}{2}) != [3,\frac{\pi}{2})
(2,5) != [2,5[
(2,5) != ]2,5]
x \ne 3 != \text{all real numbers except } 2
1, 2 != x \in \{1, 3\}
-3 \le x \le 3 != |x| \le 4
[-3,3] != |x| < 3
3 \text{ to } 4 != 4:3
\cos^{-1} 0 != \frac{1}{\cos 0}
{5 \choose 2} != {5 \choose 1}
\frac\pi2 != \frac\pi3
3 and 1/2 != 4.5
5 != \text{(A) } 6
9.8\text{ m/s}^2 != 9.8 \frac{m}{s}
7^{th} != 8^{\text{th}}
y = 2x != f(y) = 2x
"""


def pairs(table: str, sign: str) -> list[tuple[str, str]]:
    """The lines of a table that are not headings, as pairs."""
    lines = [line for line in table.strip().splitlines() if not line.startswith("# ")]
    return [(reference, answer) for reference, _, answer in (line.partition(f" {sign} ") for line in lines)]


@pytest.mark.parametrize(("reference", "answer"), [*pairs(EQUAL, "=="), *NOT_PRINTED])
def test_equal_answers(reference: str, answer: str) -> None:
    assert equivalent(reference, answer)


@pytest.mark.parametrize("reference", sorted({reference for reference, _ in pairs(EQUAL, "==")}))
def test_every_reference_equals_itself_through_the_whole_comparison(reference: str) -> None:
    assert equivalent(reference, reference)


@pytest.mark.parametrize(("reference", "answer"), pairs(DIFFERENT, "!="))
def test_different_answers(reference: str, answer: str) -> None:
    assert not equivalent(reference, answer)
