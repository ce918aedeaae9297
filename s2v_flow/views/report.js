"use strict";
(() => {
  document.documentElement.classList.add("on");
  const videos = [...document.querySelectorAll("video[id]")];
  const copies = [...document.querySelectorAll("video[data-copy]")];
  const lines = [...document.querySelectorAll(".timeline")];
  const all = document.getElementById("all");
  const of = (name) => document.getElementById(name);
  if (!videos.length) return;
  const first = videos[0];
  let active = first;

  const draw = () => {
    for (const line of lines) {
      const video = of(line.dataset.for);
      const share = Math.min(video.currentTime / line.dataset.seconds, 1);
      line.querySelector(".cursor").setAttribute("transform", `translate(${1000 * share} 0)`);
      line.setAttribute("aria-valuenow", video.currentTime.toFixed(2));
      line.setAttribute("aria-valuetext", `${video.currentTime.toFixed(2)} seconds, frame ${Math.round(video.currentTime * video.dataset.fps)}`);
    }
  };
  const seek = (video, seconds) => {
    const at = Math.max(0, Math.min(seconds, video.duration || seconds));
    for (const each of all ? videos : [video]) each.currentTime = Math.min(at, each.duration || at);
    draw();
  };
  const follow = () => {  // keep all at the first one's time
    for (const video of all ? videos.slice(1) : []) {
      if (Math.abs(video.currentTime - first.currentTime) > 0.08 && first.currentTime < video.duration) video.currentTime = first.currentTime;
    }
    for (const copy of copies) {
      const video = of(copy.dataset.copy);
      if (Math.abs(copy.currentTime - video.currentTime) > (video.paused ? 0.001 : 0.08)) copy.currentTime = video.currentTime;
    }
  };
  const tick = () => {
    draw();
    follow();
    if (videos.some((video) => !video.paused)) requestAnimationFrame(tick);
  };
  const toggle = () => {
    const group = all ? videos : [active];
    const plays = group.some((video) => !video.paused);
    for (const video of group) plays ? video.pause() : video.play().catch(() => {});
  };

  for (const video of videos) {
    if (all && video !== first) video.muted = true;
    video.addEventListener("play", () => {
      active = video;
      for (const copy of copies) copy.play().catch(() => {});
      if (all) for (const other of videos) if (other.paused && !other.ended) other.play().catch(() => {});
      requestAnimationFrame(tick);
    });
    video.addEventListener("pause", () => {
      for (const copy of copies) copy.pause();
      if (all && !video.ended) for (const other of videos) other.pause();
      if (all) all.textContent = all.textContent.replace("Pause", "Play");
      tick();
    });
    video.addEventListener("playing", () => { if (all) all.textContent = all.textContent.replace("Play", "Pause"); });
    video.addEventListener("seeked", () => { draw(); follow(); });
  }
  if (all) all.addEventListener("click", toggle);

  for (const line of lines) {
    const video = of(line.dataset.for);
    line.setAttribute("role", "slider");
    line.setAttribute("tabindex", "0");
    line.setAttribute("aria-valuemin", "0");
    line.setAttribute("aria-valuemax", line.dataset.seconds);
    line.setAttribute("aria-valuenow", "0");
    const go = (event) => {
      const box = line.getBoundingClientRect();
      active = video;
      seek(video, (event.clientX - box.left) / box.width * line.dataset.seconds);
    };
    line.addEventListener("pointerdown", (event) => { line.setPointerCapture(event.pointerId); go(event); });
    line.addEventListener("pointermove", (event) => { if (event.buttons) go(event); });
  }

  document.addEventListener("keydown", (event) => {
    const target = event.target;
    if (event.ctrlKey || event.metaKey || event.altKey || target instanceof HTMLVideoElement) return;
    if (event.key === " " && !(target instanceof HTMLButtonElement)) toggle();
    else if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      if (target.closest && target.closest(".scroll, pre")) return;
      active.pause();
      const step = event.shiftKey ? 1 : 1 / active.dataset.fps;
      seek(active, active.currentTime + (event.key === "ArrowLeft" ? -step : step));
    } else return;
    event.preventDefault();
  });
  draw();
})();
