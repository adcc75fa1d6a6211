// The page around the curves: the reader's choices, the tables, the phases, the rollouts.
addEventListener("error", event => { const box = document.getElementById("error"); box.style.display = "block"; box.textContent = "The page has a fault: " + event.message; });
const PHASE_COLOURS = {refit: "#d6409f", rollout: "#4269d0", reward: "#e08a00", teacher: "#8e4ec6", train: "#2a9d8f", other: "#858b98", evaluation: "#9c6b4e"};

// The reader's choices survive the reloads of a live page.
const STORE = "kdrl-report " + location.pathname;
const kept = (() => { try { return JSON.parse(sessionStorage.getItem(STORE)) || {}; } catch { return {}; } })();
const state = Object.assign({theme: "", hidden: [], folded: [], smooth: DATA.smoothing, seeds: DATA.groups.length > 6 ? "mean" : "interval", view: "metric", metric: DATA.curves.length ? DATA.curves[0].key : "", axis: "step", scale: "linear",
  sort: null, down: true, rollout: "", step: null, prompt: 0, colouring: null}, kept);
const keep = () => { try { sessionStorage.setItem(STORE, JSON.stringify(state)); } catch { /* a browser that keeps nothing */ } };

function el(name, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "g", "text", "circle", "rect", "clipPath"].includes(name);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter(child => child !== null && child !== undefined));
  return node;
}
const shown = () => DATA.groups.map((group, g) => g).filter(g => !state.hidden.includes(DATA.groups[g].name));
const short = value => value === null ? "-" : Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-3) ? value.toExponential(1) : String(+value.toPrecision(3));
const written = (value, unit) => unit === "%" ? (100 * value).toFixed(1) + "%" : short(value);
const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
const compact = new Intl.NumberFormat("en", {notation: "compact", maximumSignificantDigits: 3}).format;
const lasting = seconds => seconds >= 7200 ? (seconds / 3600).toFixed(1) + " h" : seconds >= 120 ? (seconds / 60).toFixed(1) + " min" : seconds.toFixed(1) + " s";
const swatch = g => el("svg", {class: "key", viewBox: "0 0 18 8", "aria-hidden": "true"},
  el("line", {x1: 0, x2: 18, y1: 4, y2: 4, stroke: colour(g), "stroke-width": 3, "stroke-dasharray": dash(g)}));
const choice = (label, options, key, redraw) => el("span", {class: "group", role: "group", "aria-label": label}, el("span", {class: "soft"}, label),
  Object.entries(options).map(([value, text]) => el("button", {"aria-pressed": String(state[key] === value),
    onclick: event => { state[key] = value; keep(); for (const b of event.target.parentNode.querySelectorAll("button")) b.setAttribute("aria-pressed", String(b === event.target)); redraw(); }}, text)));
function picker(label, options, value, change) {
  const select = el("select", {onchange: event => change(event.target.value)}, options.map(([v, text]) => el("option", {value: v, selected: String(v) === String(value)}, text)));
  return el("label", {class: "group"}, el("span", {class: "soft"}, label), select);
}

function tip(left, top, content) {
  const box = document.getElementById("tip");
  box.style.display = content ? "block" : "none";
  if (!content) return;
  box.replaceChildren(content);
  box.style.left = Math.max(4, Math.min(left + 16, innerWidth - box.offsetWidth - 8)) + "px"; box.style.top = Math.max(4, Math.min(top + 16, innerHeight - box.offsetHeight - 8)) + "px";
}
function highlight(g) { for (const node of document.querySelectorAll("[data-group]")) node.classList.toggle("faded", g !== null && node.dataset.group !== String(g)); }

// ---- parts of the page -------------------------------------------------------------------------------------------------
function legend() {
  const several = DATA.groups.length > 1;
  document.getElementById("legend").replaceChildren(...DATA.groups.map((group, g) => el("button", {class: "chip", "aria-pressed": String(!state.hidden.includes(group.name)),
    title: "show or hide " + group.name, onpointerenter: () => highlight(g), onpointerleave: () => highlight(null), onfocus: () => highlight(g), onblur: () => highlight(null),
    onclick: event => { state.hidden = state.hidden.includes(group.name) ? state.hidden.filter(n => n !== group.name) : [...state.hidden, group.name]; keep();
      event.currentTarget.setAttribute("aria-pressed", String(!state.hidden.includes(group.name))); drawCurves(); drawTable(); drawPhases(); }}, swatch(g), group.name)),
    ...(several ? [["all", []], ["none", DATA.groups.map(g => g.name)]].map(([word, hidden]) => el("button", {onclick: () => { state.hidden = hidden; keep(); legend(); drawCurves(); drawTable(); drawPhases(); }}, word)) : []));
}
function drawTable() {
  const {seeds, columns} = DATA.table, order = shown();
  const column = columns.find(c => c.key === state.sort);
  if (column) order.sort((a, b) => { const [p, q] = [a, b].map(g => column.cells[g] ? column.cells[g].mean : -Infinity); return state.down ? q - p : p - q; });
  const target = columns.find(c => c.key === "accuracy"), ends = c => [c.low === null ? c.mean : c.low, c.high === null ? c.mean : c.high];
  const spans = target ? order.map(g => target.cells[g]).filter(Boolean).map(ends) : [];
  const low = Math.min(...spans.map(s => s[0])), high = Math.max(...spans.map(s => s[1])), px = v => 6 + 128 * (high > low ? (v - low) / (high - low) : .5);
  const forest = g => { const c = target.cells[g]; if (!c) return ""; const [from, to] = ends(c);
    return el("svg", {width: 140, height: 18, role: "img", "aria-label": c.text}, el("line", {x1: 0, x2: 140, y1: 9, y2: 9, stroke: "var(--grid)"}),
      el("line", {x1: px(from), x2: px(to), y1: 9, y2: 9, stroke: colour(g), "stroke-width": 2.5}), mark(g, px(c.mean), 9, 4.2)); };
  const sortable = c => el("th", {"aria-sort": state.sort === c.key ? (state.down ? "descending" : "ascending") : "none"},
    el("button", {onclick: () => { state.down = state.sort === c.key ? !state.down : true; state.sort = c.key; keep(); drawTable(); document.querySelector(`[data-sort="${c.key}"]`).focus(); }, "data-sort": c.key},
      c.title + (state.sort === c.key ? (state.down ? " ↓" : " ↑") : "")));
  document.getElementById("table").replaceChildren(el("thead", {}, el("tr", {}, el("th", {}, "configuration"), el("th", {}, "seeds"), target ? el("th", {}, "accuracy, interval") : null, columns.map(sortable))),
    el("tbody", {}, order.map(g => el("tr", {onpointerenter: () => highlight(g), onpointerleave: () => highlight(null)},
      el("td", {}, el("span", {class: "group"}, swatch(g), DATA.groups[g].name)), el("td", {}, String(seeds[g])), target ? el("td", {}, forest(g)) : null,
      columns.map(c => { const cell = c.cells[g]; return el("td", {title: cell && cell.seeds.length ? "seeds: " + cell.seeds.join(", ") : null},
        cell ? cell.text.split(/(?= ± | \[)/).map((part, i) => i ? el("small", {}, part) : part) : "-"); })))));
}
function drawPhases() {
  const order = shown().filter(g => Object.values(DATA.groups[g].phases).some(v => v > 0)), sum = g => Object.values(DATA.groups[g].phases).reduce((a, b) => a + b, 0);
  const most = Math.max(...order.map(sum), 1e-9);
  document.getElementById("phases").replaceChildren(...order.flatMap(g => [el("span", {}, DATA.groups[g].name),
    el("div", {role: "img", "aria-label": Object.entries(DATA.groups[g].phases).map(([k, v]) => `${k} ${short(v)} s`).join(", ")}, Object.entries(DATA.groups[g].phases).map(([name, seconds]) =>
      el("span", {title: `${name}: ${short(seconds)} s`, style: `width:${100 * seconds / most}%;background:${PHASE_COLOURS[name]}`}))), el("span", {class: "soft"}, short(sum(g)) + " s")]));
}
/** Every fault of every run, once. */
function alerts() {
  return el("div", {class: "scroll"}, el("table", {class: "words"}, el("thead", {}, el("tr", {}, ["run", "alert", "first step", "last step", "steps", "first message"].map(word => el("th", {}, word)))),
    el("tbody", {}, DATA.alerts.map(a => el("tr", {}, el("td", {}, a.run), el("td", {}, a.name), el("td", {}, String(a.first)), el("td", {}, String(a.last)), el("td", {}, String(a.count)), el("td", {class: "long"}, a.message))))));
}
/** The progress of each run, its time and tokens, and its starts. */
function records() {
  const starts = DATA.runs.flatMap(r => r.starts), shared = ["commit", "versions"].filter(key => starts.length && starts[0][key] && starts.every(s => s[key] === starts[0][key]));
  const columns = {run: r => r.run, step: r => r.progress, time: r => lasting(r.seconds), tokens: r => r.tokens === null ? "-" : compact(r.tokens)};
  if (starts.length) Object.assign(columns, {starts: r => r.starts.length ? String(r.starts.length) : "-", begun: r => r.starts.length ? r.starts[0].time || "-" : "-"});
  const told = (start, before) => [el("p", {class: "soft"}, [start.time, start.host && "on " + start.host, start.world_size && count(start.world_size, "rank"), start.resumed_from && (start.step ? `after step ${start.step}, ` : "") + "from " + start.resumed_from,
    shared.includes("commit") ? "" : start.commit && "commit " + start.commit, shared.includes("versions") ? "" : start.versions].filter(Boolean).join(", ")),
    before && before.command === start.command ? null : el("pre", {}, start.command || "command not recorded"), start.changes.map(line => el("p", {class: "soft"}, line))];
  return [el("div", {class: "scroll"}, el("table", {class: "words"}, el("thead", {}, el("tr", {}, Object.keys(columns).map(word => el("th", {}, word)))), el("tbody", {}, DATA.runs.map(r => el("tr", {}, Object.values(columns).map(of => el("td", {}, of(r)))))))),
    shared.map(key => el("p", {class: "soft"}, `${key}: ${starts[0][key]}`)),
    DATA.runs.filter(r => r.starts.length).map(r => el("details", {class: "start"}, el("summary", {}, `How ${r.run} was started`), r.starts.map((start, i) => told(start, r.starts[i - 1])))),
    starts.length ? null : el("p", {class: "soft"}, "These run directories have no record of commands and versions.")];
}

// ---- rollouts ----------------------------------------------------------------------------------------------------------
const COLOURINGS = {signal: "learning signal", advantage: "advantage", log_ratio: "log-ratio", log_prob: "surprise"};
const MEANING = {signal: "αA + βd: how strongly this token is pushed up or down", advantage: "A: the response against its group",
  log_ratio: "d = log T − log π: blue, the teacher finds the token likelier than the student did", log_prob: "log π of the token when it was sampled"};
function tokenValue(kind, prompt, answer, i) {
  const d = answer.log_ratio ? answer.log_ratio[i] : null;
  return kind === "advantage" ? answer.advantage : kind === "log_prob" ? answer.log_prob[i] : kind === "log_ratio" ? d : prompt.alpha * answer.advantage + prompt.beta * (d || 0);
}
function drawRollouts() {
  const run = DATA.rollouts.find(r => r.group === state.rollout) || DATA.rollouts.find(r => r.prompts.some(p => p.responses.some(a => a.log_ratio))) || DATA.rollouts[0], steps = [...new Set(run.prompts.map(p => p.step))];
  const hasTeacher = run.prompts.some(p => p.responses.some(a => a.log_ratio));
  if (!COLOURINGS[state.colouring]) state.colouring = hasTeacher ? "log_ratio" : "advantage";
  const step = steps.includes(state.step) ? state.step : steps.at(-1), prompts = run.prompts.filter(p => p.step === step);
  const prompt = prompts[Math.min(state.prompt, prompts.length - 1)], index = run.prompts.indexOf(prompt);
  const go = to => { const p = run.prompts[to]; state.step = p.step; state.prompt = run.prompts.filter(q => q.step === p.step).indexOf(p); keep(); drawRollouts(); };
  const values = run.prompts.flatMap(p => p.responses.flatMap(a => a.tokens.map((_, i) => Math.abs(tokenValue(state.colouring, p, a, i) || 0)))).sort((a, b) => a - b);
  const strong = values[Math.floor(values.length * .99)] || 1;
  const shade = v => v === null || !v ? "" : `background:color-mix(in srgb, var(--${v > 0 ? "plus" : "minus"}) ${Math.round(75 * Math.min(1, Math.abs(v) / strong))}%, transparent)`;
  const focused = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.keep : null;
  document.getElementById("rollouts").replaceChildren(
    el("div", {class: "bar"}, picker("run", DATA.rollouts.map(r => [r.group, r.run]), run.group, v => { state.rollout = v; state.step = null; state.prompt = 0; keep(); drawRollouts(); }),
      picker("step", steps.map(s => [s, s]), step, v => { state.step = +v; state.prompt = 0; keep(); drawRollouts(); }),
      el("span", {class: "group"}, el("button", {"data-keep": "prev", disabled: index === 0, onclick: () => go(index - 1), "aria-label": "previous prompt"}, "←"), el("span", {}, `prompt ${index + 1} of ${run.prompts.length}`),
        el("button", {"data-keep": "next", disabled: index === run.prompts.length - 1, onclick: () => go(index + 1), "aria-label": "next prompt"}, "→")),
      choice("colour", COLOURINGS, "colouring", drawRollouts)),
    el("p", {class: "soft"}, MEANING[state.colouring], el("span", {class: "scale", style: "background:linear-gradient(90deg,color-mix(in srgb,var(--minus) 75%,transparent),transparent,color-mix(in srgb,var(--plus) 75%,transparent))"}), `−${short(strong)} to ${short(strong)}`,
      !hasTeacher && ["log_ratio", "signal"].includes(state.colouring) ? "; this run's files hold no log-probs of the teacher" : ""),
    el("p", {}, el("strong", {style: "white-space:pre-wrap"}, prompt.prompt), el("span", {class: "soft"}, `   answer ${prompt.answer || "-"}; ${prompt.correct} of ${prompt.size} responses correct; α = ${short(prompt.alpha)}, β = ${short(prompt.beta)}`)),
    el("div", {class: "answers"}, prompt.responses.map(answer => {
      const detail = el("div", {class: "detail"}, "arrow keys walk through the tokens");
      const spans = answer.tokens.map((text, i) => el("span", {style: shade(tokenValue(state.colouring, prompt, answer, i)), "data-i": i}, text.includes("\n") ? [el("i", {}, "⏎"), text] : text));
      let at = -1;
      const select = i => { if (at >= 0) spans[at].classList.remove("at"); at = Math.max(0, Math.min(spans.length - 1, i)); spans[at].classList.add("at"); spans[at].scrollIntoView({block: "nearest"});
        detail.textContent = `token ${at + 1}: ${JSON.stringify(answer.tokens[at])}, log π ${answer.log_prob[at]}` + (answer.log_ratio ? `, log T − log π ${answer.log_ratio[at]}` : ""); };
      return el("div", {class: "answer"}, el("header", {}, el("strong", {class: answer.correct ? "good" : "bad"}, answer.correct ? "✓ correct" : "✗ incorrect"),
        el("span", {class: "soft"}, `reward ${short(answer.reward)}, advantage ${answer.advantage > 0 ? "+" : ""}${answer.advantage}${answer.finish === "length" ? ", cut off" : ""}`)),
        el("div", {class: "tokens", tabindex: 0, role: "textbox", "aria-readonly": "true", "aria-label": "response", onpointerover: event => { const i = event.target.closest("[data-i]"); if (i) select(+i.dataset.i); },
          onkeydown: event => { const move = {ArrowLeft: -1, ArrowRight: 1}[event.key]; if (move) { event.preventDefault(); select(at + move); } }}, spans, answer.cut ? el("span", {class: "soft"}, ` … ${answer.cut} more tokens`) : null),
        detail);
    })));
  if (focused) { const again = document.querySelector(`[data-keep=${focused}]`); if (again && !again.disabled) again.focus(); }
}

// ---- the whole ---------------------------------------------------------------------------------------------------------
function section(title, ...children) { return el("section", {"aria-label": title}, el("h2", {}, title), ...children); }
function build() {
  const runs = DATA.groups.flatMap(group => group.runs), done = runs.filter(run => run.step >= run.steps).length;
  document.getElementById("stamp").textContent = `${count(DATA.groups.length, "configuration")}, ${count(runs.length, "run")} (${done} finished), written ${DATA.written}`;
  document.title = "KDRL runs: " + DATA.groups.map(group => group.name).join(", ");
  const theme = document.getElementById("theme"), paint = () => { document.documentElement.dataset.theme = state.theme; theme.textContent = "theme: " + (state.theme || "as the system"); };
  theme.addEventListener("click", () => { state.theme = {"": "light", light: "dark", dark: ""}[state.theme]; keep(); paint(); });
  theme.hidden = false; paint();
  const main = document.getElementById("main");
  main.append(section("Summary", DATA.notes.map(note => el("p", {class: "note"}, note)), el("div", {class: "scroll"}, el("table", {id: "table"})),
    el("p", {class: "soft", style: "margin:.7rem 0 0"}, `${DATA.intervals} Accuracy, greedy and length are held out, "at start" is the evaluation before training; reward, KL and entropy are means over the last ${DATA.final_steps} steps.`)));
  if (DATA.alerts.length) main.append(section(`Alerts (${DATA.alerts.length})`, alerts()));
  const spelled = () => state.smooth > DATA.width ? `mean of ${state.smooth} steps` : DATA.width > 1 ? `mean of ${DATA.width} steps` : "off", smoothing = el("output", {}, spelled());
  const axes = Object.keys(AXES).filter(axis => axis === "step" || DATA.groups.some(group => group.runs.some(run => run[axis].at(-1))));
  main.append(section("Curves", el("div", {class: "bar"}, choice("panels", {metric: "a metric each", group: "a configuration each"}, "view", drawCurves),
    el("span", {id: "metric"}, picker("of", DATA.curves.map(c => [c.key, c.title]), state.metric, v => { state.metric = v; keep(); drawCurves(); })),
    choice("against", Object.fromEntries(axes.map(axis => [axis, {step: "steps", tokens: "tokens", seconds: "time"}[axis]])), "axis", drawCurves),
    choice("scale", {linear: "linear", log: "logarithmic"}, "scale", drawCurves),
    choice("intervals", {mean: "none", interval: "95 %", each: "each seed"}, "seeds", drawCurves),
    el("label", {class: "group"}, el("span", {class: "soft"}, "smoothing"), el("input", {type: "range", min: DATA.width, max: 50 * DATA.width, step: DATA.width, value: state.smooth, oninput: event => { state.smooth = +event.target.value; smoothing.textContent = spelled(); keep(); drawCurvesSoon(); }}), smoothing)),
    el("p", {class: "soft"}, "Dots with whiskers are evaluations. Bands and whiskers are 95 % intervals, computed as above; for training curves of a single run, from the standard errors over the step's prompts, if it has them. " +
      (DATA.width > 1 ? `The longest run is so long that each point stands for ${DATA.width} steps. ` : "") + "Time is the sum of steps and evaluations, without set-up, checkpoints and pauses between starts."),
    el("div", {id: "panels"})));
  main.append(section("Time of a step, by phase (evaluations averaged over the steps)", el("div", {class: "bar"}, Object.entries(PHASE_COLOURS).map(([name, fill]) => el("span", {class: "group"}, el("span", {style: `width:12px;height:12px;border-radius:3px;background:${fill}`}), name))), el("div", {id: "phases", class: "phases"})));
  main.append(section("Runs, commands and versions", records()));
  if (DATA.rollouts.length) main.append(section("Rollouts", el("div", {id: "rollouts"})));
  if (DATA.differences.length) main.append(section("Where the configurations differ", el("div", {class: "scroll"}, el("table", {}, el("thead", {}, el("tr", {}, el("th", {}, "key"), DATA.groups.map((group, g) => el("th", {}, group.name)))),
    el("tbody", {}, DATA.differences.map(row => el("tr", {}, el("td", {}, row.key), row.values.map(v => el("td", {}, v)))))))));
  legend(); drawTable(); drawCurves(); drawPhases();
  if (DATA.rollouts.length) drawRollouts();
  if (DATA.reload) {
    const live = document.getElementById("live"); live.hidden = false; live.textContent = "● live";
    setTimeout(() => location.reload(), 1000 * DATA.reload);
  }
}
build();
