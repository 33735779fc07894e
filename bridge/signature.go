package bridge

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"net/url"
	"strings"
)

// signature is the value of webhook-signature, Standard Webhooks 1.0, "Webhook
// headers": v1 and the HMAC-SHA256 over id.timestamp.body in base64 for each
// key, separated by spaces, so that a receiver may know any one of the keys.
func signature(keys [][]byte, id, timestamp string, body []byte) string {
	var b strings.Builder
	for i, key := range keys {
		if i > 0 {
			b.WriteByte(' ')
		}
		mac := hmac.New(sha256.New, key)
		mac.Write([]byte(id + "." + timestamp + "."))
		mac.Write(body)
		b.WriteString("v1,")
		b.WriteString(base64.StdEncoding.EncodeToString(mac.Sum(nil)))
	}
	return b.String()
}

// signedID is headerValue for an id that is signed. Points separate what is
// signed, so an id from outside must not hold any (Standard Webhooks 1.0,
// "Signature scheme"): with one, a signature would hold for another id, time
// and body too. They are percent-encoded; so is the percent sign, lest two ids
// become one.
func signedID(id string) string {
	if !strings.ContainsAny(id, ".%") {
		return headerValue(id)
	}
	return strings.ReplaceAll(url.PathEscape(id), ".", "%2E")
}
