// Clips of one prompt side by side: one clock, one sound. Files are decoded when they come into view, and let go after.

const NEAR_S = 0.03; // apart by less than this, a clip is left alone
const FAR_S = 0.25; // by more than this, it jumps; between, it runs a little faster or slower

class Player {
  constructor(filter) {
    this.filter = filter;
    this.urls = new Map();
    this.making = false;
    this.cells = [];
    this.heard = 0;
    this.playing = false;
    this.at = 0; // seconds, of the clock
    this.length = 0; // of the longest clip seen, in seconds
    this.began = 0; // when the clock read 0, in ms of performance.now
    this.near = new IntersectionObserver((seen) => seen.some((one) => one.isIntersecting) && this.stills(), { rootMargin: "600px" });
    this.near.observe($("player"));
    this.watch = new IntersectionObserver((seen) => seen.forEach((one) => this.see(one)), { rootMargin: "200px" });
    content.prompts.forEach((prompt, i) => $("prompt").append(option(i, this.promptName(prompt))));
    $("prompt").addEventListener("change", () => this.show());
    $("previous").addEventListener("click", () => this.step(-1));
    $("next").addEventListener("click", () => this.step(1));
    $("all-seeds").addEventListener("change", () => this.show());
    $("size").addEventListener("change", () => $("cells").style.setProperty("--cell", `${$("size").value}px`));
    $("play").addEventListener("click", () => this.toggle());
    $("seek").addEventListener("input", () => this.seek(Number($("seek").value)));
    $("mute").addEventListener("change", () => this.sound());
    $("player").addEventListener("keydown", (event) => this.key(event));
    document.addEventListener("visibilitychange", () => document.hidden && this.pause());
  }

  promptName(prompt) {
    return `${prompt.number}: ${prompt.caption || "(the runs did not keep its words)"}`;
  }

  url(number) {
    if (content.links) return content.links[number];
    if (!this.urls.has(number)) {
      const bytes = Uint8Array.from(atob($(`medium-${number}`).textContent), (c) => c.charCodeAt(0));
      this.urls.set(number, URL.createObjectURL(new Blob([bytes], { type: "video/mp4" })));
    }
    return this.urls.get(number);
  }

  // The real clip, then a clip a variant, or one a seed.
  show() {
    const heard = this.cells[this.heard]?.key;
    this.pause();
    this.cells.forEach((cell) => this.release(cell));
    const prompt = content.prompts[$("prompt").selectedIndex];
    $("caption").textContent = prompt.caption || `Prompt ${prompt.number}`;
    const wanted = prompt.real.map((medium, i) => ({ key: `real${i}`, medium, name: prompt.real.length > 1 ? `real ${i + 1}` : "real", more: "from the data" }));
    const had = new Set();
    for (const run of this.filter.runs()) {
      const medium = prompt.clips[run.id];
      if (medium === undefined || (had.has(run.variant) && !$("all-seeds").checked)) continue;
      had.add(run.variant);
      const value = run.metrics[this.filter.tag()?.tag];
      wanted.push({ key: `${run.variant}/${run.seed}`, medium, variant: run.variant, name: content.variants[run.variant].label, more: `seed ${run.seed}` + (run.status === "finished" ? "" : `, ${run.status}`) + (value === null || value === undefined ? "" : ` · ${figure(value, 3)}`) });
    }
    this.watch.disconnect();
    this.cells = wanted.map((one, i) => this.cell(one, i));
    $("cells").replaceChildren(...this.cells.map((cell) => cell.button));
    if (!this.cells.length) $("cells").append(element("p", { class: "empty", text: "No run that is chosen has a clip of this prompt." }));
    this.cells.forEach((cell) => this.watch.observe(cell.button));
    const again = this.cells.findIndex((cell) => cell.key === heard);
    this.hear(again >= 0 ? again : Math.min(this.cells.length - 1, prompt.real.length));
    this.seek(0);
    this.near.unobserve($("player"));
    this.near.observe($("player"));
  }

  cell(one, i) {
    const name = element("span", { class: "name" });
    if (one.variant !== undefined) {
      const mark = element("span", { class: "swatch", "aria-hidden": "true" });
      mark.style.background = `var(--c${one.variant % NUM_COLOURS})`;
      name.append(mark);
    }
    name.append(one.name);
    const still = element("canvas", { class: "still", width: 1, height: 1, "aria-hidden": "true" });
    const button = element("button", { type: "button", class: "cell", "aria-pressed": "false", "aria-label": `Hear ${one.name}, ${one.more}` }, still, name, element("span", { class: "more", text: one.more }));
    button.addEventListener("click", () => this.hear(i));
    return { ...one, button, still, video: null };
  }

  see(one) {
    const cell = this.cells.find((c) => c.button === one.target);
    if (!cell) return;
    if (one.isIntersecting) this.attach(cell);
    else if (cell !== this.cells[this.heard]) this.release(cell);
  }

  attach(cell) {
    if (cell.video) return;
    const video = element("video", { playsinline: true, preload: "auto", tabindex: "-1", "aria-hidden": "true" });
    video.muted = true;
    video.src = this.url(cell.medium);
    video.addEventListener("loadedmetadata", () => {
      if (video.videoWidth) $("cells").style.setProperty("--shape", video.videoWidth / video.videoHeight);
      video.currentTime = Math.min(this.now(), video.duration);
      if (this.playing) this.start(cell);
      else this.clock();
    });
    video.addEventListener("error", () => { cell.button.querySelector(".more").textContent = "this browser cannot play the file"; });
    cell.video = video;
    cell.still.replaceWith(video);
    this.sound();
  }

  // A picture of every clip, one file at a time: what has scrolled away, or is printed, is not a black box.
  async stills() {
    if (this.making) return;
    this.making = true;
    for (const cell of [...this.cells]) {
      if (cell.drawn !== undefined || !this.cells.includes(cell)) continue;
      const video = element("video", { preload: "auto" });
      video.muted = true;
      video.src = this.url(cell.medium);
      await new Promise((done) => { for (const kind of ["loadeddata", "error"]) video.addEventListener(kind, done, { once: true }); setTimeout(done, 3000); });
      this.keep(cell, video);
      video.removeAttribute("src");
      video.load();
    }
    this.making = false;
    if (this.cells.some((cell) => cell.drawn === undefined)) this.stills();
  }

  keep(cell, video) {
    cell.drawn = null; // tried
    if (video.readyState < 2 || !video.videoWidth) return;
    [cell.still.width, cell.still.height] = [video.videoWidth, video.videoHeight];
    cell.still.getContext("2d").drawImage(video, 0, 0);
    cell.drawn = true;
  }

  release(cell) {
    if (!cell.video) return;
    this.keep(cell, cell.video);
    const video = cell.video;
    cell.video = null;
    video.pause();
    video.replaceWith(cell.still);
    video.removeAttribute("src");
    video.load();
  }

  ready() { return this.cells.filter((cell) => cell.video && cell.video.readyState >= 1 && Number.isFinite(cell.video.duration)); }

  duration() {
    const ready = this.ready();
    if (ready.length) this.length = Math.max(...ready.map((cell) => cell.video.duration));
    return this.length;
  }

  // The sound that is heard is never bent: while it plays, it is the clock.
  leader() {
    const cell = this.cells[this.heard];
    return cell?.video && cell.video.readyState >= 2 && !cell.video.paused && !cell.video.ended && !cell.video.seeking ? cell.video : null;
  }

  now() {
    if (!this.playing) return this.at;
    const leader = this.leader();
    if (leader) this.began = performance.now() - 1000 * leader.currentTime;
    return (performance.now() - this.began) / 1000;
  }

  start(cell) {
    const video = cell.video;
    const began = video?.play();
    began?.catch((error) => { if (error.name === "NotAllowedError" && !video.muted) { video.muted = true; video.play().catch(() => {}); } });
  }

  async play() {
    if (!this.cells.length || this.playing) return;
    if (this.at >= this.duration() - 0.02) this.at = 0;
    const heard = this.cells[this.heard];
    if (heard) this.attach(heard);
    this.button(true);
    const waiting = this.waiting = {};
    for (const cell of this.ready()) cell.video.currentTime = Math.min(this.at, cell.video.duration);
    // All at once: those that are slow to decode join in when they can.
    const inView = this.cells.filter((cell) => cell.video);
    const prepared = Promise.all(inView.map((cell) => cell.video.readyState >= 3 && !cell.video.seeking ? null : new Promise((done) => { for (const kind of ["canplay", "error"]) cell.video.addEventListener(kind, done, { once: true }); })));
    await Promise.race([prepared, new Promise((done) => setTimeout(done, 1500))]);
    if (this.waiting !== waiting) return;
    this.playing = true;
    this.began = performance.now() - 1000 * this.at;
    this.cells.forEach((cell) => cell.video && this.start(cell));
    requestAnimationFrame(() => this.tick());
  }

  pause() {
    this.waiting = null;
    if (this.playing) this.at = Math.min(this.now(), this.duration());
    this.playing = false;
    this.cells.forEach((cell) => cell.video?.pause());
    this.ready().forEach((cell) => { cell.video.currentTime = Math.min(this.at, cell.video.duration); });
    this.button(false);
    this.clock();
  }

  toggle() { if (this.playing || this.waiting) this.pause(); else this.play(); }

  seek(to) {
    this.at = Math.min(Math.max(0, to), this.duration());
    this.began = performance.now() - 1000 * this.at;
    for (const cell of this.ready()) {
      cell.video.playbackRate = 1;
      cell.video.currentTime = Math.min(this.at, cell.video.duration);
      if (this.playing && this.at < cell.video.duration) this.start(cell);
    }
    this.clock();
  }

  tick() {
    if (!this.playing) return;
    const end = this.duration(), leader = this.leader();
    let now = this.now();
    if (now >= end - 0.01 || this.cells[this.heard]?.video?.ended && now >= this.cells[this.heard].video.duration - 0.05 && this.ready().every((c) => c.video.ended)) {
      if (!$("loop").checked) { this.pause(); return; }
      this.seek(0);
      now = 0;
    } else {
      for (const { video } of this.ready()) {
        if (video === leader || video.seeking || video.readyState < 2) continue;
        if (video.ended || now > video.duration) continue;
        if (video.paused) { video.currentTime = now; video.play().catch(() => {}); continue; }
        const late = now - video.currentTime;
        if (Math.abs(late) > FAR_S) { video.currentTime = now; video.playbackRate = 1; }
        else video.playbackRate = Math.abs(late) < NEAR_S / 2 ? 1 : Math.abs(late) < NEAR_S && video.playbackRate === 1 ? 1 : Math.min(1.5, Math.max(0.6, 1 + 3 * late));
      }
      if (leader) leader.playbackRate = 1;
    }
    this.clock();
    requestAnimationFrame(() => this.tick());
  }

  clock() {
    const end = this.duration(), now = Math.min(this.now(), end);
    $("seek").max = end;
    $("seek").value = now;
    $("seek").setAttribute("aria-valuetext", `${now.toFixed(2)} of ${end.toFixed(2)} seconds`);
    $("time").textContent = `${now.toFixed(2)} / ${end.toFixed(2)} s`;
  }

  button(playing) {
    $("play").textContent = playing ? "Pause" : "Play";
    $("play").setAttribute("aria-pressed", playing);
  }

  hear(i) {
    const at = this.now(), before = this.cells[this.heard];
    this.heard = i;
    if (before && before !== this.cells[i]) before.button.setAttribute("aria-pressed", "false");
    const cell = this.cells[i];
    if (!cell) return;
    cell.button.setAttribute("aria-pressed", "true");
    this.attach(cell);
    // Where the new leader stands is where all are: it goes to the clock first.
    if (this.playing && cell.video.readyState >= 1 && Math.abs(cell.video.currentTime - at) > NEAR_S) cell.video.currentTime = Math.min(at, cell.video.duration);
    this.sound();
  }

  sound() {
    this.cells.forEach((cell, i) => { if (cell.video) cell.video.muted = $("mute").checked || i !== this.heard; });
  }

  step(by) {
    const count = content.prompts.length, was = this.playing;
    $("prompt").selectedIndex = ($("prompt").selectedIndex + by + count) % count;
    this.show();
    if (was) this.play();
  }

  key(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const on = event.target, typing = on.matches("select, input[type=range]"), pressing = on.matches("button, input[type=checkbox]");
    const moves = { ArrowLeft: -0.1, ArrowRight: 0.1 };
    const actions = {
      " ": () => this.toggle(), l: () => $("loop").click(), m: () => $("mute").click(), n: () => this.step(1), p: () => this.step(-1),
      ArrowUp: () => this.hear((this.heard + this.cells.length - 1) % this.cells.length), ArrowDown: () => this.hear((this.heard + 1) % this.cells.length),
      Home: () => this.seek(0), End: () => this.seek(this.duration()),
    };
    const name = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (typing || (event.key === " " && pressing)) return;
    if (event.key in moves) this.seek(this.now() + moves[event.key]);
    else if (actions[name]) {
      if (!this.cells.length && name !== "n" && name !== "p") return;
      actions[name]();
      if (name === "ArrowUp" || name === "ArrowDown") this.cells[this.heard].button.scrollIntoView({ block: "nearest" });
    } else return;
    event.preventDefault();
  }
}
