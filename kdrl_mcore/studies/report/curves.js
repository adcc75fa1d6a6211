// Curves: what is drawn of a metric, and how. The page's state and its small helpers are in page.js.
const COLOURS = ["#4269d0", "#e08a00", "#e5484d", "#2a9d8f", "#8e4ec6", "#3ca951", "#d6409f", "#9c6b4e", "#0091c2", "#858b98"];
const DASHES = ["", "6 3", "2 3", "9 3 2 3"];
const colour = g => COLOURS[g % COLOURS.length], dash = g => DASHES[Math.floor(g / COLOURS.length) % DASHES.length];
const T975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228];
const AXES = {step: "training step", tokens: "tokens trained on", seconds: "time in steps and evaluations"};
const W = 380, H = 232, LEFT = 46, RIGHT = 10, TOP = 8, BOTTOM = 38;
const FEW_POINTS = 30; // up to so many points have markers

// ---- points ------------------------------------------------------------------------------------------------------------
/** The position of a run's step on the chosen axis: the step itself, or the tokens or seconds up to it. */
function position(run, step) {
  if (state.axis === "step") return step;
  const x = run.x, y = run[state.axis];
  let i = x.findIndex(v => v >= step);
  if (i < 0) i = x.length - 1;
  if (x[i] === step) return y[i];
  const [x0, y0] = i ? [x[i - 1], y[i - 1]] : [0, 0];
  return y0 + (y[i] - y0) * (step - x0) / (x[i] - x0 || 1);
}
/** A run's smoothed points of a curve: the mean up to each, with the run's own interval if it has one. */
function points(run, curve) {
  if (state.axis !== "step" && !run[state.axis].at(-1)) return null;
  if (curve.held_out) {
    const [x, y, low = null, high = null] = run.held_out[curve.key] || [[], []];
    return x.length ? {x, y, raw: y, low, high} : null;
  }
  const values = run.y[curve.key], halves = run.half[curve.key];
  if (!values) return null;
  const kept = values.map((_, i) => i).filter(i => values[i] !== null), raw = kept.map(i => values[i]);
  const count = curve.smooth ? Math.max(1, Math.round(state.smooth / DATA.width)) : 1;
  const over = (list, f) => list.map((_, i) => f(list.slice(Math.max(0, i - count + 1), i + 1)));
  const y = over(raw, part => part.reduce((a, b) => a + b, 0) / part.length);
  const half = halves && over(kept.map(i => halves[i]), part => Math.sqrt(part.reduce((a, b) => a + b * b, 0)) / part.length);
  return {x: kept.map(i => run.x[i]), y, raw, low: half ? y.map((v, i) => v - half[i]) : null, high: half ? y.map((v, i) => v + half[i]) : null};
}
/** A group's mean at the steps that all its runs have, with the t interval over three or more seeds, or a single run's own interval. */
function aggregate(g, curve) {
  const runs = DATA.groups[g].runs.map(run => ({run, ...points(run, curve)})).filter(each => each.x);
  if (!runs.length) return null;
  for (const each of runs) each.at = each.x.map(step => position(each.run, step));
  if (runs.length === 1) { const only = runs[0]; return {g, runs, steps: only.x, at: only.at, mean: only.y, low: only.low, high: only.high}; }
  const maps = runs.map(each => new Map(each.x.map((step, i) => [step, i])));
  const steps = runs[0].x.filter(step => maps.every(map => map.has(step))), n = runs.length;
  const result = {g, runs, steps, at: [], mean: [], low: n > 2 ? [] : null, high: n > 2 ? [] : null};
  for (const step of steps) {
    const places = maps.map(map => map.get(step)), values = runs.map((each, r) => each.y[places[r]]), m = values.reduce((a, b) => a + b, 0) / n;
    result.mean.push(m);
    result.at.push(runs.reduce((sum, each, r) => sum + each.at[places[r]], 0) / n);
    if (n > 2) {
      const half = (T975[n - 2] || 1.96) * Math.sqrt(values.reduce((a, v) => a + (v - m) ** 2, 0) / (n - 1) / n);
      result.low.push(m - half); result.high.push(m + half);
    }
  }
  return steps.length ? result : null;
}
const least = list => list.reduce((a, b) => Math.min(a, b), Infinity), most = list => list.reduce((a, b) => Math.max(a, b), -Infinity);
/** The ends of both axes, and whether the vertical one is logarithmic. A t interval over few seeds that is far wider than the curves is cut off. */
function extent(series, curve) {
  const at = series.flatMap(s => s.runs.flatMap(r => state.seeds === "mean" ? s.at : r.at));
  let values = series.flatMap(s => state.seeds === "mean" ? s.mean : s.runs.flatMap(r => r.y));
  if (state.seeds === "interval") values = values.concat(series.filter(s => s.low && (curve.held_out || s.runs.length === 1)).flatMap(s => [...s.low, ...s.high]).filter(v => v !== null));
  const log = state.scale === "log" && least(values) >= 0 && most(values) > 0;
  if (log) values = values.filter(v => v > 0);
  let low = least(values), high = most(values);
  if (high - low <= 1e-6 * Math.abs(high)) high = low; // rounding is not a difference
  if (log) { const pad = (high / low) ** .06 || 1; return {x0: least(at), x1: most(at), y0: low === high ? low / 2 : low / pad, y1: low === high ? high * 2 : high * pad, log}; }
  if (low === 0 && high === 0) high = 1;
  if (least(series.flatMap(s => s.mean)) >= 0) low = Math.max(low, 0); // an interval may reach below the possible values
  if (low >= 0 && low < high * .6) low = 0;
  const pad = (high - low) * .06 || Math.abs(high) * .1 || 1;
  const top = curve.unit === "%" && high <= 1 ? Math.min(1, high + pad) : high + pad;
  return {x0: least(at), x1: most(at), y0: low === 0 && high > 0 ? 0 : low - pad, y1: top, log};
}
function ticks(low, high, count, integers) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw)), fitting = [1, 2, 5, 10].find(s => s * power >= raw * .999) * power;
  const step = integers ? Math.max(1, Math.round(fitting)) : fitting, result = [];
  for (let t = Math.ceil(low / step - 1e-9) * step; t <= high + step * 1e-6; t += step) result.push(+t.toPrecision(12));
  return result;
}
function logTicks(low, high) {
  const decades = Math.log10(high / low), digits = decades > 2 ? [1] : [1, 2, 5], result = [];
  for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p += Math.max(1, Math.ceil(decades / 6))) for (const d of digits) result.push(+(d * 10 ** p).toPrecision(3));
  const inside = result.filter(t => t >= low && t <= high);
  return inside.length > 2 ? inside : ticks(low, high, 4);
}
/** The unit of the horizontal axis, chosen by its largest value: its size and its name. */
function axisUnit(longest) {
  if (state.axis === "tokens") return longest >= 2e9 ? [1e9, "billions"] : longest >= 2e6 ? [1e6, "millions"] : longest >= 2e4 ? [1e3, "thousands"] : [1, ""];
  if (state.axis === "seconds") return longest >= 3 * 86400 ? [86400, "days"] : longest >= 7200 ? [3600, "hours"] : longest >= 300 ? [60, "minutes"] : [1, "seconds"];
  return [1, ""];
}
/** Which lines (lists of points in pixels) coincide at half or more of their common points: lists of their indices, the longest line first. */
function coinciding(lines) {
  const classes = [];
  for (const i of lines.map((_, i) => i).sort((a, b) => lines[b].length - lines[a].length)) {
    const same = classes.find(({members}) => { const other = new Map(lines[members[0]].map(([x, y]) => [x.toFixed(1), y])), common = lines[i].filter(([x]) => other.has(x.toFixed(1)));
      const near = common.filter(([x, y]) => Math.abs(other.get(x.toFixed(1)) - y) < .6).length;
      if (common.length < 2 || near < common.length / 2) return false;
      if (near < common.length) classes.find(each => each.members === members).whole = false;
      return true; });
    if (same) same.members.push(i); else classes.push({members: [i], whole: true});
  }
  return classes.filter(({members}) => members.length > 1);
}

// ---- a panel -----------------------------------------------------------------------------------------------------------
const MARKS = [r => `M${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0Z`, r => `M${-r * .9} ${-r * .9}h${r * 1.8}v${r * 1.8}h${-r * 1.8}Z`,
  r => `M0 ${-r * 1.2}L${r * 1.15} ${r * .85}H${-r * 1.15}Z`, r => `M0 ${-r * 1.3}L${r * 1.3} 0L0 ${r * 1.3}L${-r * 1.3} 0Z`];
const mark = (g, x, y, r) => el("path", {class: "mark", d: MARKS[g % MARKS.length](r), transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})`, fill: colour(g), ...r > 3 && {stroke: "var(--card)", "stroke-width": .8}});

/** Curves of some groups; for the groups in `behind` only faint means, for comparison. Null if none of them has the metric. */
function panel(title, curve, groups, range, behind = []) {
  const series = groups.map(g => aggregate(g, curve)).filter(Boolean);
  if (!series.length) return null;
  const {x0, x1, y0, y1, log} = range || extent(series, curve);
  const px = x => LEFT + (W - LEFT - RIGHT) * (x1 > x0 ? (x - x0) / (x1 - x0) : .5);
  const share = y => log ? Math.log(Math.max(y, y0 / 2) / y0) / Math.log(y1 / y0) : (y - y0) / (y1 - y0 || 1), py = y => TOP + (H - TOP - BOTTOM) * (1 - share(y));
  const pixels = (at, values) => at.map((x, i) => [px(x), py(values[i]), values[i]]);
  const drawable = value => value !== null && !(log && value <= 0);
  // A logarithmic axis cannot show zero: the line ends there.
  const path = dots => { let open = false; return dots.map(([x, y, v]) => { if (!drawable(v)) { open = false; return ""; } const step = (open ? "L" : "M") + x.toFixed(1) + " " + y.toFixed(1); open = true; return step; }).join(""); };
  const svg = el("svg", {viewBox: `0 0 ${W} ${H}`, tabindex: 0, role: "img", "aria-label": `${title}, against ${AXES[state.axis]}; arrow keys read the values`});
  const [size, unit] = axisUnit(x1);
  for (const t of log ? logTicks(y0, y1) : ticks(y0, y1, 5)) svg.append(el("line", {x1: LEFT, x2: W - RIGHT, y1: py(t), y2: py(t), stroke: "var(--grid)"}),
    el("text", {x: LEFT - 6, y: py(t) + 4, "text-anchor": "end"}, curve.unit === "%" ? +(100 * t).toPrecision(3) + "%" : short(t)));
  for (const t of ticks(x0 / size, x1 / size, 5, state.axis === "step")) svg.append(el("text", {class: "tick", x: px(t * size), y: H - 22, "text-anchor": px(t * size) > W - 24 ? "end" : "middle"}, String(t)));
  svg.append(el("text", {x: (LEFT + W - RIGHT) / 2, y: H - 6, "text-anchor": "middle", class: "axis"}, AXES[state.axis] + (unit ? ` (${unit})` : "")));
  const clip = "clip" + (panel.count = (panel.count || 0) + 1), inside = {"clip-path": `url(#${clip})`};
  svg.append(el("clipPath", {id: clip}, el("rect", {x: LEFT - 5, y: TOP - 5, width: W - LEFT - RIGHT + 10, height: H - TOP - BOTTOM + 10})),
    el("line", {x1: LEFT, x2: W - RIGHT, y1: H - BOTTOM, y2: H - BOTTOM, stroke: "var(--line)"}));
  for (const s of behind.map(g => aggregate(g, curve)).filter(Boolean)) svg.append(el("path", {d: path(pixels(s.at, s.mean)), fill: "none", stroke: "var(--line)", ...inside}));

  const lines = series.map(s => pixels(s.at, s.mean)), same = coinciding(lines);
  const below = new Set(same.map(({members}) => members[0])); // the longest of coinciding lines is drawn whole, under the dashes of the others
  for (const i of series.map((_, i) => i).sort((a, b) => below.has(b) - below.has(a) || a - b)) {
    const s = series[i], g = s.g, layer = el("g", {"data-group": g, ...inside}), {members} = same.find(each => each.members.includes(i)) || {};
    const faint = (at, values) => layer.append(el("path", {class: "each", d: path(pixels(at, values)), fill: "none", stroke: colour(g), "stroke-width": .8, opacity: .4}));
    if (s.runs.length > 1 && (state.seeds === "each" || state.seeds === "interval" && s.runs.length === 2)) for (const run of s.runs) faint(run.at, run.y);
    if (s.runs.length === 1 && curve.smooth && state.smooth > DATA.width && groups.length < 4) faint(s.at, s.runs[0].raw);
    if (state.seeds === "interval" && s.low) {
      if (curve.held_out) s.at.forEach((x, k) => s.low[k] === null || layer.append(el("line", {class: "whisker", x1: px(x), x2: px(x), y1: py(s.low[k]), y2: py(s.high[k]), stroke: colour(g), "stroke-width": 1.3, opacity: .7})));
      else layer.append(el("path", {class: "band", d: path([...pixels(s.at, s.high), ...pixels(s.at, s.low).reverse()].map(([x, y]) => [x, y, 1])) + "Z", fill: colour(g), opacity: .13}));
    }
    // Coinciding curves share the line: a dash of each colour in turn.
    const turn = members && {"stroke-dasharray": below.has(i) ? "" : `9 ${9 * (members.length - 1)}`, "stroke-dashoffset": -9 * members.indexOf(i), "stroke-width": 2.4};
    layer.append(el("path", {class: "curve", d: path(lines[i]), fill: "none", stroke: colour(g), "stroke-width": 1.8, "stroke-dasharray": dash(g), "stroke-linejoin": "round", ...turn}));
    if (curve.held_out ? s.at.length <= 2 * FEW_POINTS : !members && s.at.length <= FEW_POINTS || s.at.length === 1) for (const [x, y, v] of lines[i]) if (drawable(v)) layer.append(mark(g, x, y, curve.held_out ? 3.4 : 2));
    svg.append(layer);
  }
  const remarks = same.map(({members, whole}) => (members.length === series.length && series.length > 3 ? "all" : members.length > 4 ? members.length + " of them" : members.map(i => DATA.groups[series[i].g].name).join(", ")) + (whole ? " coincide" : " coincide in part"));
  if (state.scale === "log") remarks.push(...(log ? series.some(s => s.mean.some(v => v <= 0)) ? ["zeros are not drawn"] : [] : ["linear: not all values are positive"]));
  reading(svg, series, curve, {x0, x1, px});
  return el("figure", {}, el("figcaption", {title}, title, curve.unit && curve.unit !== "%" ? el("span", {class: "soft"}, " · " + curve.unit) : null), svg,
    remarks.length ? el("div", {class: "soft remark"}, remarks.join("; ")) : null);
}
/** The values at the pointer, or at the position chosen by the arrow keys. */
function reading(svg, series, curve, {x0, x1, px}) {
  const cross = el("line", {y1: TOP, y2: H - BOTTOM, stroke: "var(--soft)", "stroke-dasharray": "2 2", visibility: "hidden"});
  svg.append(cross);
  const xs = [...new Set(series.flatMap(s => s.at))].sort((a, b) => a - b), near = state.axis === "step" ? 0 : (x1 - x0) / 50;
  const nearest = (list, x) => list.reduce((best, v, i) => Math.abs(v - x) < Math.abs(list[best] - x) ? i : best, 0);
  let at = xs.length - 1;
  const show = (left, top) => {
    cross.setAttribute("x1", px(xs[at])); cross.setAttribute("x2", px(xs[at])); cross.setAttribute("visibility", "visible");
    const rows = series.map(s => ({s, i: nearest(s.at, xs[at])})).filter(({s, i}) => Math.abs(s.at[i] - xs[at]) <= near).sort((a, b) => b.s.mean[b.i] - a.s.mean[a.i]).slice(0, 24);
    const steps = [...new Set(rows.map(({s, i}) => s.steps[i]))];
    tip(left, top, el("table", {}, el("tr", {}, el("th", {colspan: 3}, steps.length === 1 ? "step " + steps[0] : "steps " + least(steps) + " to " + most(steps))),
      rows.map(({s, i}) => el("tr", {}, el("td", {}, swatch(s.g)), el("td", {style: "text-align:left"}, DATA.groups[s.g].name), el("td", {}, written(s.mean[i], curve.unit) + between(s, i, curve.unit))))));
  };
  const between = (s, i, unit) => !s.low || s.low[i] === null || s.runs.length > 1 && s.low[i] === s.high[i] ? "" :
    s.runs.length > 1 ? " ± " + written(s.high[i] - s.mean[i], unit) : ` [${written(s.low[i], unit)}, ${written(s.high[i], unit)}]`;
  const hide = () => { cross.setAttribute("visibility", "hidden"); tip(); };
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), x = x0 + ((event.clientX - box.left) / box.width * W - LEFT) / (W - LEFT - RIGHT) * (x1 - x0);
    at = nearest(xs, x); show(event.clientX, event.clientY);
  });
  svg.addEventListener("pointerleave", hide); svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", event => {
    const move = {ArrowLeft: -1, ArrowRight: 1, Home: -xs.length, End: xs.length}[event.key];
    if (!move) return;
    event.preventDefault(); at = Math.min(xs.length - 1, Math.max(0, at + move));
    const box = svg.getBoundingClientRect(); show(box.left + box.width / 2, box.top + box.height / 2);
  });
}
function drawCurves() {
  const box = document.getElementById("panels"), groups = shown();
  if (state.view === "metric") {
    const families = [...new Set(DATA.curves.map(curve => curve.family))].map(family => [family, DATA.curves.filter(curve => curve.family === family).map(curve => panel(curve.title, curve, groups)).filter(Boolean)]);
    box.replaceChildren(...families.filter(([, panels]) => panels.length).map(([family, panels]) => el("details", {open: !state.folded.includes(family),
      ontoggle: event => { state.folded = state.folded.filter(name => name !== family).concat(event.target.open ? [] : [family]); keep(); }}, el("summary", {}, family), el("div", {class: "panels"}, panels))));
  } else {
    const curve = DATA.curves.find(c => c.key === state.metric) || DATA.curves[0], all = groups.map(g => aggregate(g, curve)).filter(Boolean);
    box.replaceChildren(el("div", {class: "panels"}, all.length ? groups.map(g => panel(DATA.groups[g].name, curve, [g], extent(all, curve), groups)).filter(Boolean) : []));
  }
  if (!box.querySelector("figure")) box.replaceChildren(el("p", {class: "soft"}, state.axis === "step" ? "Nothing to draw: no configuration that is switched on has this." : `Nothing to draw: no configuration that is switched on tells its ${state.axis}.`));
  document.getElementById("metric").hidden = state.view === "metric";
}
let drawing = 0;
/** At most once per frame, for example while a slider moves. */
function drawCurvesSoon() { cancelAnimationFrame(drawing); drawing = requestAnimationFrame(drawCurves); }
