package main

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/throughline-mqtt/throughline/rules"
)

// signedBy tells whether a receiver that has the secret takes the request, as
// Standard Webhooks says how to verify it.
func signedBy(t *testing.T, secret string, r request) bool {
	t.Helper()
	key, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(secret, "whsec_"))
	if err != nil {
		t.Fatal(err)
	}
	mac := hmac.New(sha256.New, key)
	fmt.Fprintf(mac, "%s.%s.%s", r.header.Get("webhook-id"), r.header.Get("webhook-timestamp"), r.body)
	want := "v1," + base64.StdEncoding.EncodeToString(mac.Sum(nil))
	return slices.Contains(strings.Split(r.header.Get("webhook-signature"), " "), want)
}

// TestReceiverVerifies: what arrives can be verified, on every attempt and through a rotation, and no secret is told.
func TestReceiverVerifies(t *testing.T) {
	const (
		old    = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
		fresh  = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oDO+4B8dtqYX8="
		others = "whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
	)
	dir := t.TempDir()
	file := filepath.Join(dir, "whsec")
	write := func(secret string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(secret+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(old)
	t.Setenv("THROUGHLINE_TEST_WHSEC", old)
	ruleFile := strings.Replace(hardBrake, "http://WEBHOOK/notify", `http://WEBHOOK/notify
    idempotency_key: true
    rate: 100/s
    signing: {secrets: ["${file:`+file+`}", "${env:THROUGHLINE_TEST_WHSEC}"]}`, 1)
	f := startFleet(t, ruleFile, nil)
	f.webhook.status.Store(http.StatusServiceUnavailable)
	c := dial3(t, f.mqttAddress(), "v40")
	publish3(t, c, "fleet/v40/telemetry", `{"vin":"V40","decel":9}`)
	f.webhook.await(2)
	f.webhook.status.Store(http.StatusOK)
	waitFor(t, "an empty outbox", func() bool { return strings.Contains(f.get(t, "/api/v1/outbox"), `"records":[]`) })

	before := f.webhook.requests()
	for i, r := range before {
		if !signedBy(t, old, r) || signedBy(t, fresh, r) || signedBy(t, others, r) {
			t.Errorf("attempt %d: webhook-signature %q", i+1, r.header.Get("webhook-signature"))
		}
		if id := r.header.Get("webhook-id"); id == "" || r.header.Get("Idempotency-Key") != id {
			t.Errorf("attempt %d: Idempotency-Key %q, webhook-id %q", i+1, r.header.Get("Idempotency-Key"), id)
		}
	}
	if string(before[0].body) == string(before[1].body) {
		t.Error("two attempts have one body, trace context included")
	}

	// The file gets the new secret; the old one is still in the environment.
	write(fresh)
	if r := f.keeper.Reload(); !r.OK {
		t.Fatalf("reload: %v", r.Problems)
	}
	publish3(t, c, "fleet/v40/telemetry", `{"vin":"V40","decel":8}`)
	r := f.webhook.await(len(before) + 1)[len(before)]
	if !signedBy(t, old, r) || !signedBy(t, fresh, r) || signedBy(t, others, r) {
		t.Errorf("after the rotation: webhook-signature %q", r.header.Get("webhook-signature"))
	}

	// A secret that is no good keeps the last set in force.
	write("whsec_c2hvcnQ=")
	if r := f.keeper.Reload(); r.OK || !rules.HasErrors(r.Problems) {
		t.Errorf("reload with a short secret: %+v", r)
	}

	kept, err := os.ReadFile(filepath.Join(f.config.DataDir, "rules-last-good.json"))
	if err != nil {
		t.Fatal(err)
	}
	shown := f.logged.String() + string(kept)
	for _, path := range []string{"/api/v1/rules", "/api/v1/outbox", "/api/v1/outbox/" + r.header.Get("webhook-id"), "/metrics"} {
		shown += f.get(t, path)
	}
	for _, secret := range []string{old, fresh, "whsec_c2hvcnQ="} {
		if text := strings.TrimPrefix(secret, "whsec_"); strings.Contains(shown, text) {
			t.Errorf("secret %s is told", secret)
		}
	}
}
