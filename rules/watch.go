package rules

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
)

// watcher notices changes of rule files. It watches folders, not files, since
// editors replace files and Kubernetes swaps a link in the folder; and the
// folder above each path, since the path itself may be replaced.
type watcher struct {
	paths   []string
	fs      *fsnotify.Watcher
	changed chan struct{}
	done    chan struct{}
	stopped sync.Once
	running sync.WaitGroup
	logger  *slog.Logger
}

// newWatcher notices changes from now on, and tells of them once started.
func newWatcher(paths []string, logger *slog.Logger) (*watcher, error) {
	notify, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, fmt.Errorf("watch rule files: %w", err)
	}
	w := &watcher{fs: notify, changed: make(chan struct{}, 1), done: make(chan struct{}), logger: logger}
	for _, p := range paths {
		w.paths = append(w.paths, filepath.Clean(p))
	}
	w.cover()
	return w, nil
}

// start calls fire after changes, quiet after the last of them.
func (w *watcher) start(quiet time.Duration, fire func()) {
	w.running.Go(w.listen)
	w.running.Go(func() {
		debounce(w.done, w.changed, quiet, func() {
			w.cover() // before reading: what changes from here on is noticed
			fire()
		})
	})
}

func (w *watcher) stop() {
	w.stopped.Do(func() {
		close(w.done)
		if err := w.fs.Close(); err != nil {
			w.logger.Warn("stop watching rule files", "err", err)
		}
		w.running.Wait()
	})
}

// cover watches every folder that now holds rules. Watching one again does
// nothing; one that is gone is no longer watched by itself.
func (w *watcher) cover() {
	var seen visited
	for _, p := range w.paths {
		w.add(filepath.Dir(p))
		if info, err := os.Stat(p); err == nil && info.IsDir() {
			w.addTree(p, info, &seen, 0)
		}
	}
}

func (w *watcher) addTree(path string, info os.FileInfo, seen *visited, depth int) {
	if seen.again(info) {
		return
	}
	w.add(path)
	entries, err := os.ReadDir(path)
	if err != nil || depth == maxFolders {
		return // loading the folder reports it
	}
	for _, e := range entries {
		full := filepath.Join(path, e.Name())
		if strings.HasPrefix(e.Name(), ".") || e.Type().IsRegular() {
			continue
		}
		if info, err := os.Stat(full); err == nil && info.IsDir() {
			w.addTree(full, info, seen, depth+1)
		}
	}
}

func (w *watcher) add(path string) {
	if err := w.fs.Add(path); err != nil {
		w.logger.Warn("watch rule files", "path", path, "err", err)
	}
}

func (w *watcher) listen() {
	for {
		select {
		case ev, ok := <-w.fs.Events:
			if !ok {
				return
			}
			if !w.concerns(ev.Name) {
				continue
			}
		case err, ok := <-w.fs.Errors:
			if !ok {
				return
			}
			w.logger.Warn("watch rule files", "err", err) // events may be lost: look
		}
		select {
		case w.changed <- struct{}{}:
		default:
		}
	}
}

// concerns is false for the neighbours of the paths in the folders above them.
func (w *watcher) concerns(name string) bool {
	name = filepath.Clean(name)
	return slices.ContainsFunc(w.paths, func(p string) bool {
		return name == p || p == "." || strings.HasPrefix(name, p+string(filepath.Separator))
	})
}

// maxQuiet is how many times quiet a change waits at most while others keep
// coming.
const maxQuiet = 8

// debounce calls fire once changes have been followed by quiet, or have gone on
// for maxQuiet times that. It returns when done is closed.
func debounce(done, changes <-chan struct{}, quiet time.Duration, fire func()) {
	timer := time.NewTimer(quiet)
	timer.Stop()
	var deadline time.Time // zero: nothing pending
	for {
		select {
		case <-done:
			return
		case <-changes:
			if deadline.IsZero() {
				deadline = time.Now().Add(maxQuiet * quiet)
			}
			timer.Reset(min(quiet, time.Until(deadline)))
		case <-timer.C:
			deadline = time.Time{}
			fire()
		}
	}
}
