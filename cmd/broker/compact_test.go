package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.etcd.io/bbolt"
)

func TestOutboxCompact(t *testing.T) {
	f := startFleet(t, hardBrake, nil)
	f.webhook.status.Store(http.StatusServiceUnavailable)
	publish3(t, dial3(t, f.mqttAddress(), "v30"), "fleet/v30/telemetry", `{"vin":"V30","decel":9}`)
	id := f.webhook.await(1)[0].header.Get("webhook-id")
	config := writeConfig(t, fmt.Sprintf("data_dir: %q\nadmin: {address: %q}\n", f.config.DataDir, f.adminAddress()))

	code, _, errs := run(t, "", "outbox", "compact", "-config", config)
	if code != exitProblem || !strings.Contains(errs, "another process has it open\nhint: stop the broker first") {
		t.Errorf("running: exit %d\n%s", code, errs)
	}
	f.stopApp(t)
	file := filepath.Join(f.config.DataDir, storeFile)
	code, out, errs := run(t, "", "outbox", "compact", "-config", config, "-dry-run")
	if code != exitOK || !strings.Contains(out, file) || !strings.Contains(out, "nothing was changed") {
		t.Errorf("dry run: exit %d\n%s%s", code, out, errs)
	}
	code, out, errs = run(t, "", "outbox", "compact", "-config", config, "-json")
	var told compacted
	if err := json.Unmarshal([]byte(out), &told); code != exitOK || err != nil {
		t.Fatalf("exit %d, error %v\n%s%s", code, err, out, errs)
	}
	info, err := os.Stat(file)
	if err != nil || told.File != file || told.After != info.Size() || told.Before < told.After || told.DryRun {
		t.Errorf("told %+v; the file is %v, error %v", told, info, err)
	}
	code, out, errs = run(t, "", "outbox", "compact", "-config", config)
	if code != exitOK || !strings.Contains(out, " KiB before, ") {
		t.Errorf("again: exit %d\n%s%s", code, out, errs)
	}
	if code, out, errs := run(t, "", "outbox", "show", "-config", config, id); code != exitOK {
		t.Errorf("show: exit %d\n%s%s", code, out, errs)
	}
	f.start(t)
	f.webhook.status.Store(http.StatusOK)
	f.webhook.await(2)
}

// TestDamagedAndNewerFiles: every command that opens the data file says what is wrong with it, and leaves it alone.
func TestDamagedAndNewerFiles(t *testing.T) {
	f := startFleet(t, hardBrake, nil)
	f.webhook.status.Store(http.StatusServiceUnavailable)
	publish3(t, dial3(t, f.mqttAddress(), "v31"), "fleet/v31/telemetry", `{"vin":"V31","decel":9}`)
	f.webhook.await(1)
	f.stopApp(t)
	file := filepath.Join(f.config.DataDir, storeFile)
	sound, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	newer := filepath.Join(t.TempDir(), "newer.db")
	if err := os.WriteFile(newer, sound, 0o600); err != nil {
		t.Fatal(err)
	}
	db, err := bbolt.Open(newer, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Update(func(tx *bbolt.Tx) error {
		return tx.Bucket([]byte("store.meta")).Put([]byte("format"), []byte{0, 0, 0, 9})
	}); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	newerFile, err := os.ReadFile(newer)
	if err != nil {
		t.Fatal(err)
	}
	config := writeConfig(t, fmt.Sprintf("data_dir: %q\nadmin: {address: %q}\nlisteners: [{name: tcp, address: %q}]\n", f.config.DataDir, freeAddress(t), freeAddress(t)))
	for _, tt := range []struct {
		name, want string
		file       []byte
	}{
		{"cut off", "is damaged", sound[:len(sound)/3]},
		{"empty", "is damaged", nil},
		{"newer", "it has format 9, written by a newer version; this one reads up to format 1", newerFile},
	} {
		for _, args := range [][]string{{"outbox", "ls"}, {"outbox", "compact"}, {"outbox", "purge", "-all"}, {"serve"}} {
			if err := os.WriteFile(file, tt.file, 0o600); err != nil {
				t.Fatal(err)
			}
			code, _, errs := run(t, "", append(args, "-config", config)...)
			if code != exitProblem || !strings.Contains(errs, tt.want) || !strings.Contains(errs, file) {
				t.Errorf("%s: %q: exit %d, want %q\n%s", tt.name, args, code, tt.want, errs)
			}
			if after, err := os.ReadFile(file); err != nil || string(after) != string(tt.file) {
				t.Errorf("%s: %q has changed the file, error %v", tt.name, args, err)
			}
		}
	}
}
